"""Scores of a prompt without an N x N matrix: `column_scores` beside plain torch, the read limit and flash SDPA.

python kernels/benchmarks/bench_column_scores.py --out kernels/benchmarks/results/column_scores_h200.csv

window: the last 32 and 64 queries over all keys, as SnapKV scores a prompt. The keys must be read once, so the bytes
        over the read limit of the device are the least time; two passes over them are twice that.
h2o:    the column sums of all queries. Beside it stands the forward pass of flash SDPA over the same prompt.
Plain torch is what code of these methods does: `softmax(q @ k.T)` in fp32 of a bf16 product, where it fits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from basics import command_line, write_csv
from harness import cold_time, copies_needed, machine, read_limit
from kvpolicy_kernels.backend import Backend
from kvpolicy_kernels.column_scores import column_scores
from kvpolicy_kernels.segments import Chunk, Segments
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KV_HEADS, GROUP, DIM = 8, 4, 128
WINDOWS = [(queries, keys) for queries in (32, 64) for keys in (8192, 32768, 131072)]
PROMPTS = [4096, 16384, 32768]


def inputs(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    query = torch.randn(1, KV_HEADS * GROUP, queries, DIM, dtype=torch.bfloat16, device="cuda")
    return query, torch.randn(1, KV_HEADS, keys, DIM, dtype=torch.bfloat16, device="cuda")


def scores(query: Tensor, key: Tensor, backend: Backend = "triton") -> Tensor:
    """A prompt: nothing is in the arena yet."""
    return column_scores(query, no_entries(), Chunk(key, key), backend=backend)


@cache
def no_entries() -> Segments:
    """Tables are pinned, so that a CUDA graph can copy them."""
    rows = torch.empty(0, DIM, dtype=torch.bfloat16, device="cuda")
    zeros = torch.zeros(KV_HEADS, dtype=torch.int64).pin_memory()
    return Segments(rows, rows, zeros, zeros)


def plain(query: Tensor, key: Tensor) -> Tensor:
    n, m = query.shape[2], key.shape[2]
    logits = query.view(1, KV_HEADS, GROUP * n, DIM) @ key.transpose(-1, -2) * DIM**-0.5
    future = torch.ones(n, m, dtype=torch.bool, device="cuda").triu_(m - n + 1)
    logits = logits.view(1, KV_HEADS, GROUP, n, m).masked_fill_(future, float("-inf"))
    return torch.softmax(logits, -1, dtype=torch.float32).sum((2, 3))


def fits(queries: int, keys: int) -> bool:
    """The bf16 product and its softmax in fp32, once when warming up and once in the memory of the graph."""
    return KV_HEADS * GROUP * queries * keys * 2 * (2 + 4) * 1.1 < torch.cuda.mem_get_info()[0]


def flash(query: Tensor, key: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)


def check(queries: int, keys: int) -> float:
    """The largest error against the torch path, relative to the largest mass; raises above 1e-4."""
    query, chunk = inputs(queries, keys)
    out, expected = scores(query, chunk), scores(query, chunk, "torch")
    error = float((out - expected).abs().max() / expected.max())
    assert error < 1e-4, f"{queries} queries over {keys} keys: relative error {error:.1e}"
    return error


def measure(function: Callable[[Tensor, Tensor], Tensor], queries: int, keys: int) -> tuple[float, float]:
    nbytes = (KV_HEADS * keys + KV_HEADS * GROUP * queries) * DIM * 2
    sets = [inputs(queries, keys) for _ in range(copies_needed(nbytes))]
    return cold_time([lambda q=q, k=k: function(q, k) for q, k in sets])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out = parser.parse_args().out
    limit = read_limit()
    rows: list[dict[str, object]] = []
    cases = [("window", *case) for case in WINDOWS] + [("h2o", n, n) for n in PROMPTS]
    for name, queries, keys in cases:
        error = check(queries, keys)
        seconds, spread = measure(scores, queries, keys)
        row: dict[str, object] = {
            "case": name,
            "queries": queries,
            "keys": keys,
            "kv_heads": KV_HEADS,
            "group": GROUP,
            "dim": DIM,
            "seconds": seconds,
            "spread": spread,
            "relative_error": error,
            "torch_seconds": measure(plain, queries, keys)[0] if fits(queries, keys) else None,
        }
        if name == "window":
            row["read_once_seconds"] = KV_HEADS * keys * DIM * 2 / limit
            row["times_read_once"] = seconds / float(row["read_once_seconds"])
        else:
            row["flash_seconds"] = measure(flash, queries, keys)[0]
            row["times_flash"] = seconds / float(row["flash_seconds"])
        rows.append(row | {"read_limit": limit} | machine())
        print({key: value for key, value in row.items() if key not in ("kv_heads", "group", "dim")}, flush=True)
        torch.cuda.empty_cache()
    write_csv(out, rows)


if __name__ == "__main__":
    main()
