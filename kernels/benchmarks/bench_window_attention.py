"""The forward pass of a search, `window_attention`, beside dense flash SDPA and torch's FlexAttention.

python kernels/benchmarks/bench_window_attention.py --out kernels/benchmarks/results/window_attention_h200.csv

Every head attends to its sinks and to a window of its own. Capacities are `retention * T` for all heads, or lognormal
around it, as estimators give them. FlexAttention gets the same rule as a mask_mod that reads the windows from a tensor;
a search makes a new table a step, so the time of the BlockMask of a new table stands beside that of the attention.
Both are compiled; where that fails, the row holds the reason.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from basics import command_line, timed, write_csv
from harness import cold_time, copies_needed, machine
from kvpolicy_kernels.window_attention import window_attention
from kvpolicy_kernels.window_attention.kernel import triton_window_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

MODELS = {"8 KV heads": (8, 4, 128), "SmolLM2-135M": (3, 3, 64)}  # KV heads, query heads of each, head dim
LENGTHS = (4096, 16384)
RETENTIONS = (0.5, 0.3, 0.1)  # beside 1.0, where both kinds of capacities are the same
NUM_SINKS = 4


def capacities(kind: str, retention: float, num_kv_heads: int, length: int) -> list[int]:
    """Entries of each head, mean `retention * length` up to clipping."""
    weights = torch.ones(num_kv_heads)
    if kind == "lognormal":
        weights = torch.randn(num_kv_heads, generator=torch.Generator().manual_seed(0)).exp()
        weights = weights / weights.mean()
    return (weights * retention * length).round().int().clamp(NUM_SINKS + 1, length).tolist()


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Flex:
    """FlexAttention for one shape. One mask_mod and one tensor of windows: a new table compiles nothing again."""

    def __init__(self, num_kv_heads: int, group: int, length: int) -> None:
        self.window = torch.empty(num_kv_heads, dtype=torch.int32, device="cuda")
        self.shape = {"B": None, "H": num_kv_heads * group, "Q_LEN": length, "KV_LEN": length}
        window = self.window

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & ((k < NUM_SINKS) | (k > q - window[h // group]))

        self.rule = rule
        self.attention = torch.compile(flex_attention, dynamic=False)
        self.make_mask = torch.compile(create_block_mask, dynamic=False)

    def block_mask(self) -> BlockMask:
        return self.make_mask(self.rule, **self.shape, device="cuda")

    def measure(self, window: Tensor, sets: list[tuple[Tensor, ...]], expected: Tensor) -> dict[str, object]:
        self.window.copy_(window)
        try:
            mask = self.block_mask()
            call = lambda q, k, v: self.attention(q, k, v, block_mask=mask, enable_gqa=True)  # noqa: E731
            close(call(*sets[0]), expected)
            seconds, spread = cold_time([lambda s=s: call(*s) for s in sets])
            return {"flex_seconds": seconds, "flex_spread": spread, "block_mask_seconds": wall_time(self.block_mask)}
        except Exception as error:  # whatever the compiler raises; the other columns stand without it
            return {"flex_seconds": None, "flex_failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def wall_time(function: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds, Python and launches included: a mask is made between two steps, not in a graph."""
    return statistics.median(timed(function)[0] for _ in range(repeats))


def close(out: Tensor, expected: Tensor) -> None:
    """Within the rounding of bf16."""
    torch.testing.assert_close(out.float(), expected.float(), atol=1e-2, rtol=2e-2)


def measure(table: list[int], sets: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, dict[str, object]]:
    """The windows on the device, the expected output of the first set, and what was measured. Raises if it differs."""
    expected = window_attention(*sets[0], table, NUM_SINKS, backend="torch")
    close(window_attention(*sets[0], table, NUM_SINKS, backend="triton"), expected)
    window = torch.tensor(table, dtype=torch.int32, device="cuda") - NUM_SINKS
    scale = sets[0][0].shape[-1] ** -0.5
    # the op copies its table to the device, which a graph cannot capture
    calls = [lambda s=s: triton_window_attention(*s, window, NUM_SINKS, scale, None, None, 0) for s in sets]
    seconds, spread = cold_time(calls)
    return window, expected, {"seconds": seconds, "spread": spread}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True)
    out = parser.parse_args().out
    rows: list[dict[str, object]] = []
    tables = [("uniform", 1.0)] + [(kind, r) for r in RETENTIONS for kind in ("uniform", "lognormal")]
    for (model, (num_kv_heads, group, dim)), length in itertools.product(MODELS.items(), LENGTHS):
        heads = (num_kv_heads * group, num_kv_heads, num_kv_heads)
        sets = [
            tuple(torch.randn(1, h, length, dim, dtype=torch.bfloat16, device="cuda") for h in heads)
            for _ in range(copies_needed(sum(heads) * length * dim * 2))
        ]
        dense, _ = cold_time([lambda s=s: flash(*s) for s in sets])
        flex = Flex(num_kv_heads, group, length)
        for kind, retention in tables:
            table = capacities(kind, retention, num_kv_heads, length)
            window, expected, measured = measure(table, sets)
            row: dict[str, object] = {
                "model": model,
                "length": length,
                "capacities": kind,
                "retention": retention,
                "mean_retention": sum(table) / num_kv_heads / length,  # after clipping
                **measured,
                "flash_seconds": dense,
                "share_of_flash": float(measured["seconds"]) / dense,
                **flex.measure(window, sets, expected),
            }
            print(row, flush=True)
            rows.append(row | {"kv_heads": num_kv_heads, "group": group, "dim": dim} | machine())
            write_csv(out, rows)  # compiling takes minutes: what was measured is kept
        del sets, expected
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
