"""Triton: a program encodes the new keys, or the new values, of some segments, and writes all that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy_kernels.backend import LAUNCH, interpreted, on_its_device
from kvpolicy_kernels.encode.kernel import encoded_rows, launch_config, store_encoded
from kvpolicy_kernels.formats import Encoded, EntryFormat, block_of, signed_hadamard
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.segments import ExactCopies
from kvpolicy_kernels.tiles import cdiv


@triton.jit
def _append_encoded_kernel(
    rows_ptr, positions_ptr, entry_ptrs, centre_ptr, frequency_ptr, turn_ptrs, word_ptrs, scale_ptrs, arena_ptrs,
    number_ptrs, copy_ptrs, copied_ptr, count, heads, centres, slots, num_sinks,
    DIMS: tl.constexpr, TURN_SCALES: tl.constexpr, BLOCK_R: tl.constexpr, PLANES: tl.constexpr,
    ROTATED: tl.constexpr, COEFFICIENTS: tl.constexpr, HAS_COPIES: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i_r, i) takes BLOCK_R segments; i is 0 for keys, and for what is not a column, and 1 for values.

    centre, frequency: float32 [COEFFICIENTS, centres, D] and int32 [centres, COEFFICIENTS // 2], of the keys
    entries: [count, D], contiguous;  copies: [B, heads, slots, D];  copied: int32 [B, slots], their positions
    """
    o_r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_r = o_r < count
    # [BLOCK_R]
    b_row = tl.load(rows_ptr + o_r, mask=m_r, other=-1)
    m_row = b_row >= 0
    slot = o_r
    b_position = o_r
    if HAS_COPIES or COEFFICIENTS:
        b_position = tl.load(positions_ptr + o_r, mask=m_r, other=0)
    if HAS_COPIES:
        slot = tl.where(b_position < num_sinks, b_position, num_sinks + b_position % (slots - num_sinks))
    for i in tl.static_range(len(DIMS)):
        if tl.program_id(1) == i:
            entry_rows = entry_ptrs[i] + o_r * DIMS[i]
            i_h = o_r % centres
            frequency_ptrs = frequency_ptr + i_h * (COEFFICIENTS // 2)
            centre = centre_ptr + i_h * DIMS[i], centres * DIMS[i], frequency_ptrs, b_position.to(tl.int32)
            word, step, zero = encoded_rows(
                entry_rows, centre, turn_ptrs[i], m_r, DIMS[i], PLANES, TURN_SCALES[i], ROTATED,
                COEFFICIENTS * (i == 0), FAST, PRECISION,
            )  # fmt: skip
            store_encoded(word_ptrs[i], scale_ptrs[i], b_row, m_row, word, step, zero, DIMS[i] // PLANES)
            if HAS_COPIES:
                o_d = tl.arange(0, triton.next_power_of_2(DIMS[i]))
                m_copy = m_r[:, None] & (o_d < DIMS[i])[None, :]
                # [BLOCK_R, BLOCK_D]
                b_entry = tl.load(entry_rows[:, None] + o_d[None, :], mask=m_copy)
                tl.store(
                    copy_ptrs[i] + (o_r * slots + slot)[:, None] * DIMS[i] + o_d[None, :],
                    b_entry.to(copy_ptrs[i].dtype.element_ty), mask=m_copy,
                )  # fmt: skip
    if tl.program_id(1) == 0:
        for i in tl.static_range(len(arena_ptrs)):
            b_number = tl.load(number_ptrs[i] + o_r, mask=m_r, other=0)
            tl.store(arena_ptrs[i] + b_row, b_number.to(arena_ptrs[i].dtype.element_ty), mask=m_row)
        if HAS_COPIES:
            tl.store(copied_ptr + o_r // heads * slots + slot, b_position.to(tl.int32), mask=m_r & (o_r % heads == 0))


@on_its_device
def triton_append_encoded(
    columns: Sequence[Encoded],
    rows: Tensor,
    entries: Sequence[Tensor],
    entry_format: EntryFormat,
    arenas: Sequence[Tensor],
    numbers: Sequence[Tensor],
    positions: Tensor,
    copies: ExactCopies | None,
    key_centre: KeyCentre | None,
) -> None:
    """Arguments as in `append_encoded`."""
    flat = [entry.reshape(len(rows), -1).contiguous() for entry in entries]
    dims, config = tuple(entry.shape[1] for entry in flat), launch_config()
    _append_encoded_kernel[(cdiv(len(rows), config["BLOCK_R"]), 2)](
        rows.contiguous(), positions.contiguous(), tuple(flat),
        *((rows, rows) if key_centre is None else (key_centre.coefficients, key_centre.frequencies)),
        tuple(signed_hadamard(dim, rows.device) for dim in dims),
        tuple(column.codes for column in columns), tuple(column.scales for column in columns),
        tuple(arenas), tuple(number.contiguous() for number in numbers),
        () if copies is None else (copies.key, copies.value), None if copies is None else copies.positions,
        len(rows), 1 if copies is None else copies.key.shape[1],
        1 if key_centre is None else key_centre.shape[0], 1 if copies is None else copies.key.shape[2],
        0 if copies is None else copies.num_sinks, DIMS=dims,
        TURN_SCALES=tuple(block_of(dim) ** -0.5 for dim in dims), PLANES=entry_format.codes_in_word,
        ROTATED=entry_format.rotated,
        COEFFICIENTS=0 if key_centre is None else len(key_centre.coefficients), HAS_COPIES=copies is not None,
        FAST=not interpreted(),
        PRECISION="tf32x3" if flat[0].dtype == torch.float32 else "tf32", **config, **LAUNCH,
    )  # fmt: skip
