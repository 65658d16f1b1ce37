"""Which implementation of an op runs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "torch", "triton"]


def uses_triton(op: str, backend: Backend, tensor: Tensor, unsupported: str | None = None) -> bool:
    """Whether Triton runs an op on the device of `tensor`; torch does otherwise.

    backend: "auto" is Triton on CUDA, where it can, and torch elsewhere
    unsupported: what of this call the Triton kernels cannot do, None if they can do all of it

    Raises `ValueError` for another name, and for "triton" where Triton cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{op}: backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "torch":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    why = unsupported
    if find_spec("triton") is None:
        why = "triton is not installed"
    elif not tensor.is_cuda and not (interpreted and backend == "triton"):
        why = f"Triton runs on CUDA tensors, got {tensor.device}"
    if why is not None and backend == "triton":
        raise ValueError(f"{op}: backend='triton' cannot do this: {why}. Use backend='auto' or 'torch'")
    return why is None
