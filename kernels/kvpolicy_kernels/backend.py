"""Which implementation of an op runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
_BACKENDS = get_args(Backend)

P = ParamSpec("P")
R = TypeVar("R")

LAUNCH = {"enable_fp_fusion": True}
"""Options of every launch: triton 3.9 warns where nobody says whether to fuse multiply-adds, and 3.10 will not fuse."""


def uses_triton(op: str, backend: Backend, tensor: Tensor, unsupported: str | None = None) -> bool:
    """Whether Triton runs an op on the device of `tensor`; torch does otherwise.

    backend: "auto" is Triton on CUDA, where it can, and torch elsewhere
    unsupported: what of this call the Triton kernels cannot do, None if they can do all of it

    Raises `ValueError` for another name, and for "triton" where Triton cannot run.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return False
    why = unsupported
    if not _has_triton():
        why = "triton is not installed"
    elif backend == "auto" and not tensor.is_cuda:  # several times a token, so nothing is put into words
        return False
    elif not tensor.is_cuda and not interpreted():
        why = f"Triton runs on CUDA tensors, got {tensor.device}"
    if why is not None and backend == "triton":
        raise ValueError(f"{op}: backend='triton' cannot do this: {why}. Use backend='auto' or 'torch'")
    return why is None


@functools.cache  # looking for a package that is not loaded takes longer than many an op
def _has_triton() -> bool:
    return find_spec("triton") is not None


def on_its_device(launches: Callable[P, R]) -> Callable[P, R]:
    """`launches`, with the device of its first tensor as the current one.

    Triton launches on the current device, wherever the pointers lead: the layers of a model may lie on several.
    """

    @functools.wraps(launches)
    def placed(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _several_devices():
            return launches(*args, **kwargs)
        with torch.cuda.device_of(next(_tensors(args))):  # type: ignore[no-untyped-call]  # of torch
            return launches(*args, **kwargs)

    return placed


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments, and in sequences among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (tuple, list)):
            yield from _tensors(argument)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels of this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def at_least_hopper(device: torch.device) -> bool:
    """Whether a kernel on this device runs on compute capability 9.0 or later. The interpreter does not."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def multiplies_from_shared_memory(device: torch.device) -> bool:
    """Whether tensor cores take tiles from shared memory, of which there are 227 KB: Hopper and Blackwell's sm_100.

    Compute capability 12 is later, and has the tensor cores and the 99 KB of sm_89.
    """
    return not interpreted() and torch.cuda.get_device_capability(device)[0] in (9, 10)
