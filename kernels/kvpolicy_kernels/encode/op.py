"""Checks the arguments and picks the backend. The definition is `EntryFormat.encode`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.formats import Encoded, EntryFormat, check_dim


def encode(rows: Sequence[Tensor], entry_format: EntryFormat, *, backend: Backend = "auto") -> list[Encoded]:
    """`EntryFormat.encode` of several tensors in one launch: the keys and the values of new tokens.

    rows: each [..., D], floating point, with a D of its own; all of one device
    backend: "auto" is Triton on CUDA and torch elsewhere

    What comes back are columns as arenas hold them: `append` writes them to their rows.
    On CUDA the codes may be off by one where the sums of a rotation round differently.
    Raises `ValueError` for a head dim that has no format, and for a backend that cannot run here.
    """
    for tensor in rows:
        check_dim(tensor.shape[-1])
    beyond = "rows of 16 bits are not encoded" if entry_format.bits == 16 else None
    if not rows or not uses_triton("encode", backend, rows[0], beyond):
        return [entry_format.encode(tensor) for tensor in rows]
    from kvpolicy_kernels.encode.kernel import triton_encode

    found: list[Encoded] = triton_encode(rows, entry_format)
    return found
