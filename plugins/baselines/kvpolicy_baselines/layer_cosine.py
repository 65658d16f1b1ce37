"""Layer cosine: how much attention turns the residual stream, layer by layer.

Source: SqueezeAttention, arXiv:2404.04793; hetailang/SqueezeAttention, utils_hh/modify_llama_drop.py. Different on
purpose:

- Importance is 1 - cosine, since larger means more important here. That changes no distance between layers.
- Measured once, over the calibration prompts. The source measures every prompt that it answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvpolicy import Importance, ImportanceEstimator, LayerActivations, ModelProbe, PluginError


@dataclass(frozen=True, slots=True)
class LayerCosineEstimator(ImportanceEstimator):
    """Importance of a layer = 1 - mean cosine of the residual stream before and after attention.

    Tokens weigh alike inside a prompt, prompts weigh alike. The KV heads of a layer all get its importance.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"hidden_before", "hidden_after"})

    def estimate(self, probe: ModelProbe) -> Importance:
        layers, heads = probe.spec.table_shape
        changes: list[list[Tensor]] = [[] for _ in range(layers)]

        def visit(activations: LayerActivations) -> None:
            before, after = activations.hidden_before, activations.hidden_after
            changes[activations.layer].append(1 - cosine_similarity(before.float(), after.float(), dim=-1).mean().cpu())

        probe.observe(visit, self.requires)
        if not all(changes):
            raise PluginError("layer_cosine: the probe ran no prompt; it needs at least one")
        per_layer = torch.stack([torch.stack(of_layer).mean() for of_layer in changes]).clamp(min=0)
        return Importance(per_head=per_layer[:, None].repeat(1, heads), per_layer=per_layer)
