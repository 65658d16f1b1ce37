"""Tokens a second, time to the first token, and how many requests fit: vLLM with a plan beside vLLM without one.

    python plugins/vllm/benchmarks/serve.py --seconds 360 --out plugins/vllm/benchmarks/results/serve_h200.csv

Llama-3-8B's shape with weights that vLLM makes up, prompts of random tokens, plans whose shares are lognormal with
sigma 1. `dense` and `fp8` are vLLM as it is, `slab` has fixed capacities, `blocks` ones that grow with the length, and
`keydiff` and `snapkv` have slabs whose entries are chosen by their keys, and by the attention of the last queries. Each
job of `JOBS` has an engine and a process of its own, in the order of their worth, until the seconds are over; a job
that fails or takes too long loses its own rows alone. Rows are written as they come:

- `fits`: requests of the longest length that the memory holds, by vLLM's own count.
- `batch`: as many requests at once as fit; tokens a second of their decoding. Their prompts count as read and their
  entries are random numbers, because reading a hundred prompts of 32k tokens takes minutes. Under a policy
  that cuts, their lengths are spread over a period, so that in every step some are cut, as when requests come and go.
- `single`: one prompt, which is read; seconds to its first token, milliseconds a token behind it. Twice, two rows.
- `trace`: Poisson arrivals of prompts of 2k tokens up to the context, 128 to 512 tokens each; tokens a second, and the
  50th and 99th percentile of the time to the first token and of the time of a token. The jobs `...-small` have two
  fifths of the device's memory, where what a request takes decides how many are served at once.

All decode in CUDA graphs, without torch.compile, which takes half a minute of a start (`--compile` for it). `--tiny` is
for a look on a CPU: a small model, contexts of 256 tokens, figures that mean nothing.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

COLUMNS = (
    "job", "system", "run", "context", "kept", "requests", "output_tokens", "seconds_to_first_token",
    "seconds_to_first_token_p99", "ms_a_token", "ms_a_token_p99", "tokens_a_second", "concurrency", "kv_bytes",
    "start_seconds", "compiled", "device", "torch", "vllm",
)  # fmt: skip
SINKS = 4
CUT, PERIOD = ("keydiff", "snapkv"), 512  # systems whose heads are cut back, and the tokens from cut to cut
CHUNK = 8192  # vLLM's max_num_batched_tokens
DECODE = 128  # tokens of each answer in `batch` and `single`
ARRIVALS, RATE = 48, 1.5  # requests of `trace`, and how many come in a second
LONGEST_JOB = 110.0  # seconds after which a job is given up


@dataclass(frozen=True, slots=True)
class Job:
    """One engine.

    context: tokens of a request, its answer included;  kept: fraction of the entries
    memory:  vLLM's gpu_memory_utilization
    """

    system: str
    context: int
    kept: float
    runs: tuple[str, ...]
    max_num_seqs: int
    memory: float = 0.9


JOBS = {
    "slab-20-trace": Job("slab", 32768, 0.2, ("fits", "trace"), 128),
    "dense-trace": Job("dense", 32768, 1.0, ("fits", "trace"), 128),
    "blocks-20": Job("blocks", 32768, 0.2, ("fits", "batch"), 160),
    "slab-30-128k": Job("slab", 131072, 0.3, ("single",), 8),
    "dense-128k": Job("dense", 131072, 1.0, ("single",), 8),
    "keydiff-20": Job("keydiff", 32768, 0.2, ("fits", "batch", "single"), 160),
    "blocks-30": Job("blocks", 32768, 0.3, ("single",), 8),
    "blocks-30-128k": Job("blocks", 131072, 0.3, ("single",), 8),
    "slab-20-trace-small": Job("slab", 32768, 0.2, ("fits", "trace"), 128, 0.4),
    "dense-trace-small": Job("dense", 32768, 1.0, ("fits", "trace"), 128, 0.4),
    "slab-30": Job("slab", 32768, 0.3, ("single",), 8),
    "snapkv-20": Job("snapkv", 32768, 0.2, ("fits", "batch", "single"), 160),
    "slab-20": Job("slab", 32768, 0.2, ("fits", "batch"), 160),
    "dense": Job("dense", 32768, 1.0, ("fits", "batch", "single"), 32),
    "fp8": Job("fp8", 32768, 1.0, ("fits", "batch"), 64),
}
"""In the order of what is not known yet."""


def main() -> None:
    options = _parser().parse_args()
    if options.job is None:
        _all(options)
    else:
        _one(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="serve.csv", help="CSV, to which rows are added")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no job goes on after these")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--compile", action="store_true", help="with torch.compile, as vLLM does by itself")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    return parser


def _all(options: argparse.Namespace) -> None:
    """While a job runs, the next one's process imports what it needs, and waits for a line of its own."""
    end = time.monotonic() + options.seconds
    failed = []
    following = _child(options.jobs[0])
    for name, next_name in itertools.zip_longest(options.jobs, options.jobs[1:]):
        child, following = following, _child(next_name) if next_name else None
        begin = time.monotonic()
        print(f"{name} ... ({end - begin:.0f} s left)", flush=True)
        try:
            child.communicate("go\n", timeout=max(0.1, min(LONGEST_JOB, end - begin)))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        print(f"{name}: status {child.returncode} after {time.monotonic() - begin:.1f} s", flush=True)
        if child.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"no rows, or not all, of: {', '.join(failed)}")


def _child(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *sys.argv, "--job", name], stdin=subprocess.PIPE, text=True)


def _one(options: argparse.Namespace) -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    job = JOBS[options.job]
    if options.tiny:
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", TORCHDYNAMO_DISABLE="1")
        job = replace(job, context=256, max_num_seqs=8)
    import torch
    import vllm.model_executor.models.llama

    if torch.cuda.is_available():
        import vllm.v1.worker.gpu.model_runner  # noqa: F401
    sys.stdin.readline()
    with tempfile.TemporaryDirectory() as folder:
        Bench(options, job, Path(folder)).run()


class Bench:
    """One engine, and its rows."""

    def __init__(self, options: argparse.Namespace, job: Job, folder: Path) -> None:
        import torch
        import vllm

        self.options, self.job = options, job
        self.chunk, self.decode = (64, 8) if options.tiny else (CHUNK, DECODE)
        begin = time.perf_counter()
        config = _write_model(folder, options.tiny, job.context)
        extra: dict[str, Any] = {}
        if job.system == "fp8":
            extra["kv_cache_dtype"] = "fp8"
        if job.system not in ("dense", "fp8"):
            settings = _write_plan(folder, config, job, options.tiny)
            if job.system != "blocks":
                settings["context_length"] = job.context
            extra["additional_config"] = {"kvpolicy": settings}
        if not options.compile:
            extra["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        self.engine = vllm.LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=job.context,
            max_num_batched_tokens=self.chunk,
            max_num_seqs=job.max_num_seqs,
            cudagraph_capture_sizes=[1, 2, 4, *range(8, job.max_num_seqs + 1, 8)],
            gpu_memory_utilization=job.memory,
            enable_prefix_caching=False,
            enforce_eager=options.tiny,
            seed=0,
            **extra,
        ).llm_engine
        self.core = self.engine.engine_core.engine_core
        self.vocabulary = config.vocab_size
        self.common = {
            "job": options.job,
            "system": job.system,
            "context": job.context,
            "kept": job.kept,
            "start_seconds": round(time.perf_counter() - begin, 1),
            "compiled": options.compile,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "vllm": vllm.__version__,
        }
        self.generator = torch.Generator().manual_seed(0)
        self.count = 0

    def run(self) -> None:
        # kernels are compiled at their first use, for a first chunk, those behind it, and the last, shorter one
        self._serve([2 * self.chunk + (self.job.context - self.decode) % self.chunk], 8)
        fits = self._fits()
        for run in self.job.runs:
            if run == "batch":
                self._batch(min(self.job.max_num_seqs, math.floor(fits)))
            elif run == "single":
                for _ in range(2):
                    self._single()
            elif run == "trace":
                self._trace()

    def _fits(self) -> float:
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        cache = self.core.scheduler.kv_cache_config
        fits = float(get_max_concurrency_for_kv_cache_config(self.core.vllm_config, cache))
        if self.job.system in ("slab", *CUT):
            fits = cache.num_blocks - 1  # a block is a request, and one is vLLM's own
        if "fits" in self.job.runs:
            sizes = [tensor.size for tensor in cache.kv_cache_tensors]
            is_shared = hasattr(cache.kv_cache_tensors[0], "layers")  # from 0.32 on: parts of one allocation, its size
            memory = sizes[0] if is_shared else sum(sizes)
            self._write("fits", concurrency=round(fits, 2), kv_bytes=memory)
        return fits

    def _batch(self, count: int) -> None:
        self._fill()
        longest = self.job.context - self.decode - 1
        period = self.core.vllm_config.additional_config.get("kvpolicy", {}).get("period", 0)
        with self._prompts_count_as_read():
            served = self._serve([longest - period * i // count for i in range(count)], self.decode)
        begin = max(times[0] for _, times in served)
        end = min(times[-1] for _, times in served)
        tokens = sum(sum(begin < at <= end for at in times) for _, times in served)
        rate = round(tokens / (end - begin), 1)
        step = statistics.median(1000 * (b - a) for _, times in served for a, b in itertools.pairwise(times))
        self._write("batch", requests=count, output_tokens=tokens, tokens_a_second=rate, ms_a_token=round(step, 3))

    def _fill(self) -> None:
        """Random entries, so that no arithmetic is done on zeros."""
        import torch

        for layer in self.core.vllm_config.compilation_config.static_forward_context.values():
            cache = layer.kv_cache if isinstance(layer.kv_cache, torch.Tensor) else layer.kv_cache[0]
            if cache.dtype.itemsize == 1:
                cache.view(torch.uint8).random_(0, 64)  # bit patterns of fp8 numbers from 0 to 2
            else:
                cache.normal_()

    @contextmanager
    def _prompts_count_as_read(self) -> Iterator[None]:
        """All tokens of a prompt but the last are in the cache already, as vLLM's scheduler sees it."""
        scheduler = self.core.scheduler
        scheduler.connector = _all_read()
        try:
            yield
        finally:
            scheduler.connector = None

    def _single(self) -> None:
        served = self._serve([self.job.context - self.decode], self.decode)
        self._write("single", requests=1, output_tokens=self.decode, **_latencies(served))

    def _trace(self) -> None:
        import torch

        arrivals, rate = (6, 20.0) if self.options.tiny else (ARRIVALS, RATE)
        gaps = torch.empty(arrivals).exponential_(rate, generator=self.generator)
        longest = 128 if self.options.tiny else self.job.context - 512
        bounds = math.log(min(2048, longest // 2)), math.log(longest)
        lengths = torch.empty(arrivals).uniform_(*bounds, generator=self.generator).exp().long().tolist()
        answers = torch.randint(128, 513, (arrivals,), generator=self.generator).tolist()
        if self.options.tiny:
            answers = [answer // 32 for answer in answers]
        begin = time.perf_counter()
        served = self._serve(lengths, answers, arrivals=gaps.cumsum(0).tolist())
        seconds, tokens = time.perf_counter() - begin, sum(answers)
        rate = round(tokens / seconds, 1)
        self._write("trace", requests=arrivals, output_tokens=tokens, tokens_a_second=rate, **_latencies(served))

    def _serve(
        self, lengths: list[int], answers: int | list[int], *, arrivals: list[float] | None = None
    ) -> list[tuple[float, list[float]]]:
        """When each request came, and when each of its tokens did."""
        import torch
        from vllm import SamplingParams

        wanted = [answers] * len(lengths) if isinstance(answers, int) else answers
        prompts = [torch.randint(3, self.vocabulary, (n,), generator=self.generator).tolist() for n in lengths]
        due = arrivals or [0.0] * len(lengths)
        came: dict[str, float] = {}
        times: dict[str, list[float]] = {}
        begin, added, first = time.perf_counter(), 0, self.count
        self.count += len(lengths)
        while added < len(lengths) or self.engine.has_unfinished_requests():
            now = time.perf_counter() - begin
            while added < len(lengths) and due[added] <= now:
                sampling = SamplingParams(temperature=0, max_tokens=wanted[added], ignore_eos=True, detokenize=False)
                name = str(first + added)
                came[name], times[name] = due[added], []
                self.engine.add_request(name, {"prompt_token_ids": prompts[added]}, sampling)
                added += 1
            if not self.engine.has_unfinished_requests():
                time.sleep(max(0.0, due[added] - (time.perf_counter() - begin)))
                continue
            for output in self.engine.step():
                times[output.request_id].append(time.perf_counter() - begin)
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


def _all_read() -> Any:
    """For the scheduler alone: the workers have nothing to load."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

    class AllRead(KVConnectorBase_V1, SupportsHMA):
        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
            return request.num_tokens - 1 - num_computed_tokens, False

        def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
            return False, None

        def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

        update_state_after_alloc = build_connector_meta = _nothing
        start_load_kv = wait_for_layer_load = save_kv_layer = wait_for_save = _nothing

    return AllRead.__new__(AllRead)


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


def _write_plan(folder: Path, config: Any, job: Job, tiny: bool) -> dict[str, Any]:
    """Its file and retention. Shares lognormal with sigma 1, clipped so that blocks hold them and periods are long."""
    import torch

    import kvpolicy
    from kvpolicy.budget.plan import PlanChoice

    spec = kvpolicy.ModelSpec.from_config(config)
    shares = torch.randn(spec.table_shape, generator=torch.Generator().manual_seed(0)).exp()
    least, policy = max(SINKS + 1, job.context // 64), PlanChoice("streaming", {"num_sink_tokens": SINKS})
    if job.system in CUT:
        params = {"recent_window": 4 if tiny else 32}
        if job.system == "snapkv":
            params["observation_window"] = params["recent_window"]
        least, policy = 64 if tiny else 4 * PERIOD, PlanChoice(job.system, params)
    kept = max(job.kept, 0.5) if tiny else job.kept
    budget = kvpolicy.Budget(spec.total_entries(kept, job.context), spec.table_shape, least, job.context)
    plan = kvpolicy.BudgetPlan.from_capacities(
        spec, kvpolicy.apportion(shares, budget), context_length=job.context, policy=policy
    )
    kvpolicy.save_plan(plan, folder / "plan.json")
    return {"plan": str(folder / "plan.json"), "retention": float(plan.levels[0].retention)}


if __name__ == "__main__":
    main()
