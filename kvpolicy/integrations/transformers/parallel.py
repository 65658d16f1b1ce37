"""Tensor parallelism: which part of the heads this process holds."""

from __future__ import annotations

from transformers import PreTrainedModel


def rank_and_size(model: PreTrainedModel) -> tuple[int, int]:
    """(rank, ranks) of the model's tensor-parallel group; (0, 1) without one."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or not getattr(model, "_tp_size", None):
        return 0, 1
    return int(mesh.get_local_rank()), int(mesh.size())
