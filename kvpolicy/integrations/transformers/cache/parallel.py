"""Tensor parallelism: which part of the KV heads this process holds."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.model.spec import ModelSpec

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def rank_and_size(model: PreTrainedModel, spec: ModelSpec) -> tuple[int, int]:
    """(rank, ranks) among the processes that share the KV heads; (0, 1) where every process has all of them.

    That is the case without tensor parallelism, and with it where transformers gathers the keys again (fused
    projections, too few heads).
    """
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None) or 1
    if mesh is None or size == 1 or not _splits_heads(model, spec):
        return 0, 1
    one = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh  # 5.17 makes a mesh of one unnamed dimension
    return int(one.get_local_rank()), int(size)


def _splits_heads(model: PreTrainedModel, spec: ModelSpec) -> bool:
    """Whether the plan leaves each process its own part of the keys of the budgeted layers."""
    attention, _ = attention_modules(model, spec.budgeted_layers[:1])[0]
    name = next(name for name, module in model.named_modules() if module is attention)
    rules = {_LAYER_NUMBER.sub("*", module): style for module, style in (model.tp_plan or {}).items()}
    styles = [rules.get(f"{_LAYER_NUMBER.sub('*', name)}.{projection}") for projection in _KEY_PROJECTIONS]
    return "colwise" in styles
