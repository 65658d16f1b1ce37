"""Segments in an arena with garbage around them, and their attention computed in another way."""

import math
from dataclasses import replace

import torch
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.segments import BlockSegments, Chunk, Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
VARIANTS = [{}, {"softcap": 2.0}, {"sinks": True}, {"scale": 0.6}, {"softcap": 3.0, "sinks": True}]


def options(variant, num_q_heads):
    kept = {name: x for name, x in variant.items() if name != "sinks"}
    return kept | ({"sink_logits": torch.linspace(-1, 2, num_q_heads, device=DEVICE)} if "sinks" in variant else {})


def arena(lengths, dim, value_dim, dtype=torch.float32, gap=2, backwards=True):
    """Segments with rows of NaN before, between and after them."""
    rows = sum(lengths) + gap * (len(lengths) + 1)
    keys, values = torch.full((rows, dim), NAN), torch.full((rows, value_dim), NAN)
    starts, row = [0] * len(lengths), gap
    order = range(len(lengths))
    for i in reversed(order) if backwards else order:
        starts[i] = row
        keys[row : row + lengths[i]] = torch.randn(lengths[i], dim)
        values[row : row + lengths[i]] = torch.randn(lengths[i], value_dim)
        row += lengths[i] + gap
    return Segments(keys.to(DEVICE, dtype), values.to(DEVICE, dtype), torch.tensor(starts), torch.tensor(lengths))


def key_centre(heads, dim, pairs=3, size=20.0):
    """Some of it turns, from slow to as fast as an angle of 32 bits can."""
    coefficients = size * torch.randn(1 + 2 * pairs, heads, dim)
    frequencies = (2.0 ** (31 * torch.rand(heads, pairs))).clamp(max=2**31 - 200).to(torch.int32)
    return KeyCentre(coefficients.to(DEVICE), frequencies.to(DEVICE))


def interleaved(segments):
    """The same entries where each row of one arena holds a key, something else, and a value."""
    keys, values = segments.keys, segments.values
    rows = torch.cat([keys, torch.full_like(keys, NAN), values], 1)
    return replace(segments, keys=rows[:, : keys.shape[1]], values=rows[:, 2 * keys.shape[1] :])


def in_blocks(lengths, sizes, dim, dtype=torch.float32):
    """Segments of these lengths in blocks of as many entries as `sizes` says of each KV head, and NaN around them.

    Sequences take blocks in no order, and behind those that they need there is a number of no block.
    """
    sequences, used = len(lengths) // len(sizes), [-(-n // sizes[i % len(sizes)]) for i, n in enumerate(lengths)]
    needed = [max(used[i : i + len(sizes)]) for i in range(0, len(used), len(sizes))]
    rows_per_block, blocks = sum(sizes) + 3, torch.full((sequences, max(needed) + 2), 10**6, dtype=torch.int32)
    order = torch.randperm(sum(needed) + 1).int()
    for i, count in enumerate(needed):
        blocks[i, :count], order = order[:count], order[count:]
    offsets = torch.tensor([1 + sum(sizes[:h]) for h in range(len(sizes))])
    columns = [torch.full(((sum(needed) + 1) * rows_per_block, dim), NAN).to(DEVICE, dtype) for _ in range(2)]
    tables = blocks.to(DEVICE), rows_per_block, offsets.to(DEVICE), torch.tensor(sizes).to(DEVICE)
    segments = BlockSegments(*columns, *tables, torch.tensor(lengths).to(DEVICE))
    for i, length in enumerate(lengths):
        sequence, head = divmod(i, len(sizes))
        for j in range(length):
            number, inside = divmod(j, sizes[head])
            row = int(blocks[sequence, number]) * rows_per_block + int(offsets[head]) + inside
            for column in columns:
                column[row] = torch.randn(dim).to(DEVICE, dtype)
    return segments


def oracle(query, segments, chunk=None, *, scale=None, softcap=None, sink_logits=None, entry_mask=None):
    """Dense exponentials in fp64, times a mask of what is seen, one segment at a time.

    Returns the attention, the log-sum-exps [B, num_q_heads, n], and the mass of each row of the arena.
    """
    (batch, num_q_heads, n, dim), num_segments = query.shape, len(segments)
    num_kv_heads = num_segments // batch
    grouped = query.double().reshape(num_segments, -1, n, dim)
    sinks = torch.full((num_q_heads,), -math.inf) if sink_logits is None else sink_logits
    out, lse, mass = [], [], torch.zeros(len(segments.keys), dtype=torch.float64, device=DEVICE)
    for s, (start, length) in enumerate(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True)):
        b, h = divmod(s, num_kv_heads)
        k, v = (x[start : start + length].double() for x in (segments.keys, segments.values))
        seen = torch.ones(n, length, device=DEVICE) if entry_mask is None else entry_mask[s]
        if chunk is not None:
            m, mask = chunk.key.shape[2], chunk.mask
            k, v = torch.cat([k, chunk.key[b, h].double()]), torch.cat([v, chunk.value[b, h].double()])
            causal = torch.tensor([[j <= i + m - n for j in range(m)] for i in range(n)], device=DEVICE)
            seen = torch.cat([seen, causal if mask is None else mask[b % len(mask), 0]], 1)
        x = grouped[s] @ k.T * (dim**-0.5 if scale is None else scale)
        weights = (x if softcap is None else softcap * (x / softcap).tanh()).exp() * seen
        total = weights.sum(-1, keepdim=True) + sinks.view(num_kv_heads, -1, 1, 1)[h].double().exp().to(DEVICE)
        p = weights / torch.where(total > 0, total, 1)
        out.append(p @ v)
        lse.append(total.log())
        mass[start : start + length] = p[..., :length].sum((0, 1))
    shape = (batch, num_q_heads, n)
    return torch.stack(out).view(*shape, -1), torch.stack(lse).view(shape), mass


def chunked(batch, num_q_heads, lengths, n, m, value_dim, dim=8):
    """Queries, segments and a chunk of m tokens."""
    num_kv_heads = len(lengths) // batch
    key, value = (torch.randn(batch, num_kv_heads, m, x, device=DEVICE) for x in (dim, value_dim))
    return torch.randn(batch, num_q_heads, n, dim, device=DEVICE), arena(lengths, dim, value_dim), Chunk(key, value)
