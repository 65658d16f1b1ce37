"""Checks the arguments and picks the backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvpolicy_kernels.backend import Backend, uses_triton
from kvpolicy_kernels.decode_attention.plan import WorkPlan
from kvpolicy_kernels.decode_attention.reference import reference_decode_attention
from kvpolicy_kernels.segments import beyond_kernel, check_attention


class Attended(NamedTuple):
    """What `decode_attention` returns.

    out:  [B, num_q_heads, n, Dv]
    lse:  float32 [B, num_q_heads, n], log of the sum over all that a query sees, its sink included; -inf for nothing
    mass: float32 [R], for each row of the arena its attention summed over queries and query group; 0 outside segments
    """

    out: Tensor
    lse: Tensor | None
    mass: Tensor | None


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    chunk_key: Tensor | None = None,
    chunk_value: Tensor | None = None,
    chunk_mask: Tensor | None = None,
    plan: WorkPlan | None = None,
    with_lse: bool = False,
    with_mass: bool = False,
    backend: Backend = "auto",
) -> Attended:
    """`ragged_attention` for the few queries of a decoding step, a rejected draft, or a short turn.

    Every query sees all entries of its segment, and the tokens of the chunk, which are not in the arena yet, causally
    or under `chunk_mask`. The arguments up to `chunk_mask` are those of `ragged_attention`; `starts` and `lengths` may
    lie on the device, and then nothing is read back. Segments that leave the arena are noticed on the CPU only.

    plan: of `plan_work` for these segments, to be used again from step to step; None makes one
    with_lse, with_mass: what to return besides; `mass` covers entries, not the chunk
    backend: "auto" is Triton on CUDA and torch elsewhere. Triton takes 16 queries at most, and 128 together with the
        query heads of a group, head dims up to 256, and tensors of one dtype: float32, bfloat16 or float16

    On CUDA the key and value of an entry are read once, for all queries of its group, and equal work goes to every
    multiprocessor whatever the lengths: split-K as in Flash-Decoding (Dao et al., 2023) under the schedule of
    `WorkPlan`. The result is the same, bit by bit, for the same plan and lengths.
    Raises `ValueError` for shapes that do not fit and for a backend that cannot do this.
    """
    num_kv_heads = check_attention(
        "decode_attention", query, keys, values, starts, lengths, sink_logits, chunk_key, chunk_value, chunk_mask
    )
    if plan is not None and plan.pieces.shape != (len(starts), 2):
        raise ValueError(
            f"decode_attention: {len(starts)} segments need a plan whose pieces are [{len(starts)}, 2], got "
            f"{list(plan.pieces.shape)}; a plan of several layers is taken layer by layer: plan.layer(i)"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if uses_triton("decode_attention", backend, query, beyond_kernel(query, keys, values, num_kv_heads)):
        from kvpolicy_kernels.decode_attention.kernel import triton_decode_attention

        return Attended(
            *triton_decode_attention(
                query, keys, values, starts, lengths, scale, softcap, sink_logits, chunk_key, chunk_value, chunk_mask,
                plan, with_lse, with_mass,
            )
        )  # fmt: skip
    out, lse, mass = reference_decode_attention(
        query, keys, values, starts, lengths, scale, softcap, sink_logits, chunk_key, chunk_value, chunk_mask
    )
    return Attended(out, lse if with_lse else None, mass if with_mass else None)
