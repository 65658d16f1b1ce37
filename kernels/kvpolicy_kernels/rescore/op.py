"""Checks the arguments and picks the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.rescore.reference import reference_rescore


def rescore(scores: Tensor, new: Tensor, positions: Tensor, fault: Tensor, *, backend: Backend = "auto") -> None:
    """In place `scores = new`, but -inf in free rows; and `fault` becomes True where an entry's new score is NaN.

    scores, new: float32 [R], contiguous
    positions: int [R], contiguous; -1 for a free row, of which `new` may be anything
    fault: bool [], which is never made False
    backend: "auto" is Triton on CUDA, if `fault` lies there too, and torch elsewhere

    One launch, without a wait. Raises `ValueError` for shapes and dtypes that do not fit, and for a backend that cannot
    run here.
    """
    for name, tensor in (("scores", scores), ("new", new)):
        if tensor.dtype != torch.float32 or tensor.shape != positions.shape or not tensor.is_contiguous():
            raise ValueError(
                f"rescore: expected {name} contiguous float32 {list(positions.shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )
    if positions.dim() != 1 or positions.is_floating_point() or not positions.is_contiguous():
        raise ValueError(
            f"rescore: expected positions contiguous int [R], got {positions.dtype} {list(positions.shape)}"
        )
    if fault.dtype != torch.bool or fault.dim():
        raise ValueError(f"rescore: expected fault bool [], got {fault.dtype} {list(fault.shape)}")
    elsewhere = None if fault.device == scores.device else "fault lies on another device"
    if uses_triton("rescore", backend, scores, elsewhere):
        from kvpolicy_kernels.rescore.kernel import triton_rescore

        triton_rescore(scores, new, positions, fault)
    else:
        reference_rescore(scores, new, positions, fault)
