"""Checks the arguments and picks the backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpolicy_kernels.append_encoded.reference import reference_append_encoded
from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.formats import Encoded, EntryFormat, check_dim
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.segments import ExactCopies


def append_encoded(
    columns: Sequence[Encoded],
    rows: Tensor,
    entries: Sequence[Tensor],
    entry_format: EntryFormat,
    *,
    positions: Tensor,
    arenas: Sequence[Tensor] = (),
    numbers: Sequence[Tensor] = (),
    copies: ExactCopies | None = None,
    key_centre: KeyCentre | None = None,
    backend: Backend = "auto",
) -> None:
    """`encode` and `append` of a token in one launch, with what is known of it besides, and its exact copy.

    columns: of keys and of values, with contiguous rows
    rows:    int64 [S] on their device, distinct; one row per segment
    entries: key and value, [B, num_kv_heads, 1, D]
    arenas, numbers: each [R], and [S] what is written into it
    positions: int64 [S], of the token in each sequence, which says where its copy goes
    copies:  get the entry as it is
    key_centre: what keys are encoded less of
    backend: "auto" is Triton on CUDA and torch elsewhere

    Raises `ValueError` for shapes and counts that do not fit, and for a backend that cannot run here.
    """
    count = len(rows)
    if len(columns) != 2 or len(entries) != 2 or len(arenas) != len(numbers) or len(positions) != count:
        raise ValueError(
            f"append_encoded: expected two columns, two entries, as many arenas as numbers and {count} positions, got "
            f"{len(columns)}, {len(entries)}, {len(arenas)} and {len(numbers)}, and {len(positions)}"
        )
    for column, entry in zip(columns, entries, strict=True):
        check_dim(entry.shape[-1])
        width = entry.shape[-1] // entry_format.codes_in_word
        if entry.numel() != count * entry.shape[-1] or column.codes.shape[1:] != (width,):
            raise ValueError(
                f"append_encoded: {count} rows of {width} words need an entry of {count} rows, got {list(entry.shape)} "
                f"for codes {list(column.codes.shape)}"
            )
    dim = entries[0].shape[-1]
    if key_centre is not None and (count % key_centre.shape[0] or key_centre.shape[1] != dim):
        raise ValueError(
            f"append_encoded: expected a key_centre of shape [num_kv_heads, {dim}] for {count} segments, got "
            f"{key_centre.shape}"
        )
    beyond = "rows of 16 bits are not encoded" if entry_format.bits == 16 else None
    arguments = (columns, rows, entries, entry_format, arenas, numbers, positions, copies, key_centre)
    if not uses_triton("append_encoded", backend, rows, beyond):
        return reference_append_encoded(*arguments)
    from kvpolicy_kernels.append_encoded.kernel import triton_append_encoded

    triton_append_encoded(*arguments)
    return None
