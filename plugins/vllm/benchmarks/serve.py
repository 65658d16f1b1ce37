"""Tokens a second, time to the first token, and how many requests fit: vLLM with a plan beside vLLM without one.

    python plugins/vllm/benchmarks/serve.py --out plugins/vllm/benchmarks/results/serve_h200.csv

Llama-3-8B's shape with weights that vLLM makes up, prompts of random tokens, plans whose shares are lognormal with
sigma 1. Each system runs in a process of its own: `dense` and `fp8` are vLLM as it is, `slab` has fixed capacities,
`blocks` ones that grow with the length. Rows are written as they come:

- `fits`: requests of the longest length that the memory holds, by vLLM's own count.
- `single`: one prompt; seconds to its first token, milliseconds a token behind it.
- `batch`: as many prompts at once as fit (`--batch` for another number); tokens a second once all of them decode.
- `trace`: Poisson arrivals of prompts of 2k tokens up to the context, 128 to 512 tokens each; tokens a second, and the
  50th and 99th percentile of the time to the first token and of the time of a token.

`--tiny` is for a look on a CPU: a small model, contexts of 256 tokens, figures that mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SYSTEMS = ("dense", "fp8", "slab", "blocks")
RUNS = ("fits", "single", "batch", "trace")
COLUMNS = (
    "system",
    "run",
    "context",
    "kept",
    "requests",
    "output_tokens",
    "seconds_to_first_token",
    "seconds_to_first_token_p99",
    "ms_a_token",
    "ms_a_token_p99",
    "tokens_a_second",
    "concurrency",
    "kv_bytes",
    "start_seconds",
    "device",
    "torch",
    "vllm",
)
SINKS = 4


def main() -> None:
    options = _parser().parse_args()
    if options.system is None:
        _all(options)
    else:
        _one(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="serve.csv", help="CSV, to which rows are added")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--context", type=int, default=32768, help="tokens of a request, its answer included")
    parser.add_argument("--kept", type=float, default=0.2, help="fraction of the entries")
    parser.add_argument("--batch", type=int, help="requests of `batch` instead of those that fit")
    parser.add_argument("--decode", type=int, default=64, help="tokens of each answer in `single` and `batch`")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals a second in `trace`")
    parser.add_argument("--arrivals", type=int, default=100, help="requests of `trace`")
    parser.add_argument("--memory", type=float, default=0.9, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--chunk", type=int, default=8192, help="vLLM's max_num_batched_tokens")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs and compilation")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser


def _all(options: argparse.Namespace) -> None:
    """A process for each system, because an engine keeps its memory."""
    failed = []
    for system in options.systems:
        print(f"{system} ...", flush=True)
        if subprocess.run([sys.executable, *sys.argv, "--system", system], check=False).returncode:
            failed.append(system)
    if failed:
        sys.exit(f"no rows, or not all, of: {', '.join(failed)}")


def _one(options: argparse.Namespace) -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if options.tiny:
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", TORCHDYNAMO_DISABLE="1")
        options.context, options.chunk, options.decode, options.eager = 256, 64, 8, True
        options.arrivals, options.rate, options.batch = 6, 20.0, options.batch or 4
    with tempfile.TemporaryDirectory() as folder:
        Bench(options, Path(folder)).run()


class Bench:
    """One engine, and its rows."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import torch
        import vllm

        self.options = options
        begin = time.perf_counter()
        config = _write_model(folder, options.tiny, options.context)
        extra: dict[str, Any] = {}
        if options.system == "fp8":
            extra["kv_cache_dtype"] = "fp8"
        if options.system in ("slab", "blocks"):
            settings = {"plan": _write_plan(folder, config, options.kept, options.context), "retention": options.kept}
            if options.system == "slab":
                settings["context_length"] = options.context
            extra["additional_config"] = {"kvpolicy": settings}
        self.engine = vllm.LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=options.context,
            max_num_batched_tokens=options.chunk,
            max_num_seqs=512 if not options.tiny else 8,
            gpu_memory_utilization=options.memory,
            enable_prefix_caching=False,
            enforce_eager=options.eager,
            seed=0,
            **extra,
        ).llm_engine
        self.vocabulary = config.vocab_size
        self.common = {
            "system": options.system,
            "context": options.context,
            "kept": options.kept if options.system in ("slab", "blocks") else 1.0,
            "start_seconds": round(time.perf_counter() - begin, 1),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "vllm": vllm.__version__,
        }
        self.generator = torch.Generator().manual_seed(0)
        self.count = 0

    def run(self) -> None:
        fits = self._fits()
        self._serve([self.options.chunk // 2], 4)  # kernels are compiled at their first use
        if "single" in self.options.runs:
            self._single()
        if "batch" in self.options.runs:
            self._batch(self.options.batch or max(1, min(512, math.floor(fits))))
        if "trace" in self.options.runs:
            self._trace()

    def _fits(self) -> float:
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        core = self.engine.engine_core.engine_core
        cache = core.scheduler.kv_cache_config
        fits = float(get_max_concurrency_for_kv_cache_config(core.vllm_config, cache))
        if self.options.system == "slab":
            fits = cache.num_blocks - 1  # a block is a request, and one is vLLM's own
        if "fits" in self.options.runs:
            sizes = [tensor.size for tensor in cache.kv_cache_tensors]
            is_shared = hasattr(cache.kv_cache_tensors[0], "layers")  # from 0.32 on: parts of one allocation, its size
            memory = sizes[0] if is_shared else sum(sizes)
            self._write("fits", concurrency=round(fits, 2), kv_bytes=memory)
        return fits

    def _single(self) -> None:
        served = self._serve([self.options.context - self.options.decode], self.options.decode)
        self._write("single", requests=1, output_tokens=self.options.decode, **_latencies(served))

    def _batch(self, count: int) -> None:
        """All are there from the start. What counts is the time in which every request decodes."""
        options = self.options
        # the first to come decode while the last are read, chunk by chunk
        steps = count * math.ceil(options.context / (options.chunk - count)) + options.decode
        length = options.context - steps - 8
        if length < options.context // 2:
            sys.exit(f"{count} requests of {options.context} tokens take {steps} steps: give a smaller --batch")
        served = self._serve([length] * count, options.decode, hold=True)
        begin = max(times[0] for _, times in served)
        end = min(times[-1] for _, times in served)
        tokens = sum(sum(begin < at <= end for at in times) for _, times in served)
        rate = round(tokens / (end - begin), 1) if end > begin else None
        self._write("batch", requests=count, output_tokens=options.decode, tokens_a_second=rate)

    def _trace(self) -> None:
        import torch

        options = self.options
        gaps = torch.empty(options.arrivals).exponential_(options.rate, generator=self.generator)
        longest = 128 if options.tiny else options.context - 512
        bounds = math.log(min(2048, longest // 2)), math.log(longest)
        lengths = torch.empty(options.arrivals).uniform_(*bounds, generator=self.generator).exp().long().tolist()
        answers = torch.randint(128, 513, (options.arrivals,), generator=self.generator).tolist()
        if options.tiny:
            answers = [answer // 32 for answer in answers]
        begin = time.perf_counter()
        served = self._serve(lengths, answers, arrivals=gaps.cumsum(0).tolist())
        seconds, tokens = time.perf_counter() - begin, sum(answers)
        rate = round(tokens / seconds, 1)
        self._write("trace", requests=len(lengths), output_tokens=tokens, tokens_a_second=rate, **_latencies(served))

    def _serve(
        self,
        lengths: list[int],
        answers: int | list[int],
        *,
        arrivals: list[float] | None = None,
        hold: bool = False,
    ) -> list[tuple[float, list[float]]]:
        """When each request came, and when each of its tokens did.

        hold: answers go on until the last request has as many tokens as were asked for, within the context
        """
        import torch
        from vllm import SamplingParams

        wanted = [answers] * len(lengths) if isinstance(answers, int) else answers
        due = arrivals or [0.0] * len(lengths)
        came: dict[str, float] = {}
        times: dict[str, list[float]] = {}
        begin, added, first = time.perf_counter(), 0, self.count
        self.count += len(lengths)
        while added < len(lengths) or self.engine.has_unfinished_requests():
            now = time.perf_counter() - begin
            while added < len(lengths) and due[added] <= now:
                most = self.options.context - lengths[added] if hold else wanted[added]
                sampling = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
                prompt = torch.randint(3, self.vocabulary, (lengths[added],), generator=self.generator).tolist()
                name = str(first + added)
                came[name], times[name] = due[added], []
                self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
                added += 1
            if not self.engine.has_unfinished_requests():
                time.sleep(max(0.0, due[added] - (time.perf_counter() - begin)))
                continue
            for output in self.engine.step():
                times[output.request_id].append(time.perf_counter() - begin)
            enough = all(len(some) >= wanted[0] for some in times.values())
            if hold and enough and added == len(lengths):
                self.engine.abort_request(list(times))
        return [(came[name], times[name]) for name in times]

    def _write(self, run: str, **figures: Any) -> None:
        row = {**self.common, "run": run, **figures}
        path = Path(self.options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        print(json.dumps(row), flush=True)


def _latencies(served: list[tuple[float, list[float]]]) -> dict[str, float]:
    """Medians and 99th percentiles: over requests for the first token, over tokens for the others."""
    first = [times[0] - came for came, times in served]
    others = [1000 * (after - before) for _, times in served for before, after in itertools.pairwise(times)]
    return {
        "seconds_to_first_token": round(statistics.median(first), 3),
        "seconds_to_first_token_p99": round(_percentile(first, 0.99), 3),
        "ms_a_token": round(statistics.median(others), 3),
        "ms_a_token_p99": round(_percentile(others, 0.99), 3),
    }


def _percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(part * len(values)) - 1)]


def _write_model(folder: Path, tiny: bool, context: int) -> Any:
    """A configuration; vLLM makes up the weights."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    vocabulary = 128256
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8}
        vocabulary = 256
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2 if tiny else 8,
        head_dim=32 if tiny else 128,
        vocab_size=vocabulary,
        max_position_embeddings=max(context, 262144),
        rope_theta=500000.0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return config


def _write_plan(folder: Path, config: Any, kept: float, context: int) -> str:
    """Shares lognormal with sigma 1, clipped so that blocks can hold them."""
    import torch

    import kvpolicy

    spec = kvpolicy.ModelSpec.from_config(config)
    shares = torch.randn(spec.table_shape, generator=torch.Generator().manual_seed(0)).exp()
    least = max(SINKS + 1, context // 64)
    budget = kvpolicy.Budget(spec.total_entries(kept, context), spec.table_shape, least, context)
    table = kvpolicy.apportion(shares, budget)
    path = folder / "plan.json"
    kvpolicy.save_plan(kvpolicy.BudgetPlan.from_capacities(spec, table, context_length=context), path)
    return str(path)


if __name__ == "__main__":
    main()
