"""What `kvpolicy estimate` says beside what a prompt and a few tokens take at most: one row for each setting.

    python benchmarks/estimate_check.py --out benchmarks/results/estimate_h200

Llama-3-8B's shape, random bf16 weights, prompts of random tokens fed in one forward, four tokens behind them.
`estimate_gigabytes` is what the verb says of the same configuration ("at most, in all"), `measured_gigabytes` the most
that torch's allocator gave out at once, weights included, and `error` their difference over what was measured.
`reserved_gigabytes` is what the allocator took from the device, and `again_gigabytes` the most of a second prompt in
the same cache after `cache.reset()`. Without a GPU the growth of the process's memory is added to the weights, to try
the script: `--layers 1 --divide 256` takes half a minute.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from shapes import described, long_llama
from shared import command_line, machine, write_csv
from transformers import DynamicCache

import kvpolicy
from kvpolicy.cache.peak_memory import PeakMemory
from kvpolicy.integrations.transformers import with_cache

TOKENS = 4


@dataclass(frozen=True)
class Setting:
    context: int
    batch: int
    policy: str | None  # None is transformers' DynamicCache
    kept: float = 1.0


SETTINGS = (
    Setting(32768, 1, None),
    Setting(32768, 1, "streaming", 0.3),
    Setting(32768, 1, "h2o", 0.1),
    Setting(8192, 8, "snapkv", 0.2),
    Setting(4096, 16, "streaming", 0.5),
    Setting(65536, 1, "snapkv", 0.3),
)


def cache_of(model: Any, setting: Setting) -> Any:
    kvpolicy.detach(model)
    if setting.policy is None:
        return DynamicCache(config=model.config)
    return kvpolicy.new_cache(model, policy=setting.policy, allocator="uniform", retention=setting.kept)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Any) -> None:
    for _ in range(TOKENS + 1):
        out = model(ids, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1:].argmax(-1)


def peak_of(model: Any, ids: torch.Tensor, cache: Any) -> int:
    """The most bytes, weights included."""
    gc.collect()
    on_gpu = ids.is_cuda
    if on_gpu:
        torch.cuda.empty_cache()
    watch = PeakMemory(ids.device, fresh=True)
    read(model, ids, cache)
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return (watch.measure() or 0) + sum(parameter.nbytes for parameter in model.parameters())


def measure(model: Any, folder: str, setting: Setting) -> dict[str, Any]:
    said = kvpolicy.estimate(
        folder,
        context=setting.context,
        batch=setting.batch,
        retention=setting.kept,
        policy=setting.policy or "streaming",
        gpu_memory="1GB",
    ).rows[0]
    estimated = said.dynamic_peak_bytes if setting.policy is None else said.peak_bytes
    generator = torch.Generator().manual_seed(setting.context)
    ids = torch.randint(0, model.config.vocab_size, (setting.batch, setting.context), generator=generator)
    ids, cache = ids.to(model.device), cache_of(model, setting)
    measured, again = peak_of(model, ids, cache), ""
    reserved = f"{torch.cuda.max_memory_reserved() / 1e9:.3f}" if ids.is_cuda else ""
    if setting.policy is not None:
        cache.reset()
        again = f"{peak_of(model, ids, cache) / 1e9:.3f}"
    return {
        "context": setting.context, "batch": setting.batch, "policy": setting.policy or "full", "kept": setting.kept,
        "estimate_gigabytes": f"{estimated / 1e9:.3f}", "measured_gigabytes": f"{measured / 1e9:.3f}",
        "error": f"{estimated / measured - 1:+.4f}", "reserved_gigabytes": reserved, "again_gigabytes": again,
        "cache_gigabytes": f"{said.cache_bytes / 1e9:.3f}", "n": 1, "seed": setting.context,
    }  # fmt: skip


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", required=True, help="beginning of the file's name: OUT.csv")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--divide", type=int, default=1, help="contexts are so many times shorter")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, rows = long_llama(options.layers, device), []
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        for each in SETTINGS:
            setting = Setting(each.context // options.divide, each.batch, each.policy, each.kept)
            row = measure(model, folder, setting)
            rows.append(row | {"model": described(model), **machine(device, "torch", "transformers", "kvpolicy")})
            print(*list(row.values())[:9], sep="\t", flush=True)
            write_csv(f"{options.out}.csv", rows)


if __name__ == "__main__":
    main()
