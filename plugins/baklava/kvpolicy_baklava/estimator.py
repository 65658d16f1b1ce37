"""Head importance: how much attention changes what goes into it.

Source: BaKlaVa (arXiv:2502.13176), abstract and the caption of figure 1: "By taking the cosine similarity between the
input and output, we can calculate how much change there is. The more change between the input and output of the
attention head, the more important we assume it is." Reconstructed: the paper's equations were not readable, so what
"input" is, how a group of query heads is merged and how layers are scored are choices, each an option here.

The layer score is SqueezeAttention's (arXiv:2404.04793; hetailang/SqueezeAttention, modify_llama_drop.py): the cosine
of the residual stream before and after attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy import Importance, ImportanceEstimator, LayerActivations, ModelProbe, PluginError

HeadInput = Literal["value", "slice", "proj", "proj_residual"]
GroupRule = Literal["mean", "max"]

_NEEDS: dict[str, frozenset[str]] = {
    "value": frozenset({"values", "output"}),
    "slice": frozenset({"attention_input", "output"}),
    "proj": frozenset({"hidden_before", "output", "output_weight"}),
    "proj_residual": frozenset({"hidden_before", "output", "output_weight"}),
}


@dataclass(frozen=True, slots=True)
class CosineEstimator(ImportanceEstimator):
    """Importance of a KV head = 1 - mean cosine of its query heads' inputs and outputs, clamped at 0.

    head_input: what a head's output is compared with, token by token
        "value": the value vector of the same token (default; cosine 1 means the token attends to itself alone)
        "slice": the head's slice of the normed hidden state (only where num_q_heads * head_dim = hidden_size)
        "proj": the residual stream, against the output projected back into it
        "proj_residual": the same, with the residual added to the projected output
    group: how the query heads of one KV head are merged, "mean" or "max"

    The first token of each prompt is left out: it can only attend to itself. Tokens weigh alike inside a prompt,
    prompts weigh alike. The layer importance is 1 - mean cosine of the residual stream before and after attention.
    """

    token_measure: ClassVar[str] = "cosine of a head's input and output"

    head_input: HeadInput = "value"
    group: GroupRule = "mean"

    def __post_init__(self) -> None:
        if self.head_input not in _NEEDS or self.group not in ("mean", "max"):
            raise PluginError(
                f"cosine: head_input must be one of {', '.join(_NEEDS)} and group mean or max, got "
                f"'{self.head_input}' and '{self.group}'"
            )

    def estimate(self, probe: ModelProbe) -> Importance:
        layers, heads = probe.spec.table_shape
        per_head, per_layer = torch.zeros(layers, heads), torch.zeros(layers)
        prompts = torch.zeros(layers)

        def visit(activations: LayerActivations) -> None:
            per_head[activations.layer] += self._head_scores(activations, heads)
            per_layer[activations.layer] += _layer_score(activations)
            prompts[activations.layer] += 1

        probe.observe(visit, _NEEDS[self.head_input] | {"hidden_before", "hidden_after"})
        if not bool(prompts.min() > 0):
            raise PluginError("cosine: the probe ran no prompt; it needs at least one of two tokens or more")
        return Importance(
            per_head=(per_head / prompts[:, None]).clamp(min=0), per_layer=(per_layer / prompts).clamp(min=0)
        )

    def token_maps(self, probe: ModelProbe) -> list[Tensor]:
        """The cosines themselves, with that of the first token, which is 1 under the default `head_input`."""
        maps = [torch.zeros(probe.spec.num_budgeted_layers, probe.spec.num_q_heads, len(p)) for p in probe.prompts]
        seen = [0] * probe.spec.num_budgeted_layers  # prompts run one after another

        def visit(activations: LayerActivations) -> None:
            layer = activations.layer
            maps[seen[layer]][layer] = self._similarity(activations)[0].cpu()
            seen[layer] += 1

        probe.observe(visit, _NEEDS[self.head_input])
        return maps

    def _head_scores(self, activations: LayerActivations, num_kv_heads: int) -> Tensor:
        """`[num_kv_heads]` on the CPU: 1 - mean cosine, merged over the query group."""
        importance = 1 - self._similarity(activations)[:, :, 1:].mean(dim=(0, 2)).cpu()
        grouped = importance.reshape(num_kv_heads, -1)
        return grouped.amax(1) if self.group == "max" else grouped.mean(1)

    def _similarity(self, activations: LayerActivations) -> Tensor:
        """`[B, num_q_heads, n]`, the cosine of each token."""
        inputs, outputs = self._pairs(activations)
        return F.cosine_similarity(inputs.float(), outputs.float(), dim=-1)

    def _pairs(self, activations: LayerActivations) -> tuple[Tensor, Tensor]:
        """(input, output) of every query head, each `[B, num_q_heads, n, dim]`."""
        output = activations.output
        num_q_heads, dim = output.shape[1], output.shape[-1]
        if self.head_input == "value":
            return activations.values.repeat_interleave(num_q_heads // activations.values.shape[1], 1), output
        if self.head_input == "slice":
            source = activations.attention_input
            if source.shape[-1] != num_q_heads * dim:
                raise PluginError(
                    f"cosine: head_input 'slice' needs hidden_size = query heads x head dim, this model has "
                    f"{source.shape[-1]} and {num_q_heads} x {dim}; use 'value'"
                )
            return source.reshape(*source.shape[:2], num_q_heads, dim).transpose(1, 2), output
        residual, weight = activations.hidden_before, activations.output_weight
        projected = torch.einsum("bhnd,ohd->bhno", output, weight.reshape(-1, num_q_heads, dim).to(output.dtype))
        inputs = residual[:, None].expand_as(projected)
        return inputs, projected + inputs if self.head_input == "proj_residual" else projected


def _layer_score(activations: LayerActivations) -> Tensor:
    """1 - mean cosine of the residual stream before and after attention, a scalar on the CPU."""
    before, after = activations.hidden_before, activations.hidden_after
    return 1 - F.cosine_similarity(before[:, 1:].float(), after[:, 1:].float(), dim=-1).mean().cpu()
