"""The same model in transformers, each KV head of each layer under its own mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from conftest import MAX_MODEL_LEN
from kvpolicy_vllm.cuts import CutLayout
from kvpolicy_vllm.layout import BlockLayout
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy import EvictionPolicy, LayerActivations


class Oracle:
    """Greedy tokens and their log-probabilities, with a forward over everything for each token.

    Layers with a sliding window have that; what `layouts` says is for the others, in their order.
    """

    def __init__(
        self, folder: str, layouts: Sequence[BlockLayout] | None, policy: EvictionPolicy | None = None
    ) -> None:
        """layouts: one for each layer; None attends to everything.  policy: of the layouts that are cut"""
        self.layouts, self.policy = layouts, policy
        ALL_ATTENTION_FUNCTIONS.register("oracle", self._attend)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="oracle"
        ).eval()
        config = self.model.config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        at, group = torch.arange(query.shape[2]), query.shape[1] // key.shape[1]
        seen = (at <= at[:, None]).expand(key.shape[1], -1, -1)
        layout = None
        if module.layer_idx not in self.full:
            seen = seen & (at > at[:, None] - module.sliding_window)
        elif self.layouts is not None:
            layout = self.layouts[self.full.index(module.layer_idx)]
        if isinstance(layout, CutLayout):
            assert self.policy is not None
            capacities = [min(slots, layout.tokens_per_block) for slots in layout.slots.tolist()]
            queries = query[0].unflatten(0, (-1, group))
            heads = zip(queries, key[0], capacities, strict=True)
            seen = torch.stack(
                [seen_by_cuts(self.policy, module.layer_idx, q, k, n, layout.period, scaling) for q, k, n in heads]
            )
        elif layout is not None:
            seen = seen & ((at < layout.num_sink_tokens) | (at >= layout.oldest(at)[:, :, None]))
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mask = seen.repeat_interleave(group, 0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2), None

    @torch.no_grad()
    def log_probabilities(self, tokens: list[int]) -> Tensor:
        """[T, vocabulary], of the token behind each."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)


def seen_by_cuts(
    policy: EvictionPolicy, layer: int, queries: Tensor, keys: Tensor, capacity: int, period: int, scale: float
) -> Tensor:
    """Which tokens each token of one head sees, bool [T, T], with a list that is cut token by token.

    queries: [group, T, D];  keys: [T, D]
    """
    seen = torch.zeros(len(keys), len(keys), dtype=torch.bool)
    kept: list[int] = []
    for token in range(len(keys)):
        if token % period == 0 and len(kept) > capacity - period and capacity < MAX_MODEL_LEN:
            sources = {"keys": keys[None, None, kept], "positions": torch.tensor([[kept]])}
            if "window_attention" in policy.requires:
                asked = range(token - policy.observation_window, token)
                sources["window_attention"] = sum(_attention(queries[:, q], keys, kept, q, scale) for q in asked)[None]
            scores = policy.score_prompt(LayerActivations(layer, **sources))[0, 0].tolist()
            recent = range(token - policy.recent_window, token)
            pinned = [at < policy.num_sink_tokens or at in recent for at in kept]
            ranked = sorted(zip(pinned, scores, kept, strict=True), reverse=True)
            kept = sorted(at for _, _, at in ranked[: capacity - period])
        kept.append(token)
        seen[token, kept] = True
    return seen


def _attention(query: Tensor, keys: Tensor, kept: list[int], at: int, scale: float) -> Tensor:
    """Of one token's queries [group, D] to the entries up to itself, summed over the group: [1, entries]."""
    logits = query @ keys[kept].T * scale
    logits = logits.masked_fill(torch.tensor(kept) > at, float("-inf"))
    return logits.softmax(-1).sum(0, keepdim=True)
