"""vLLM's tokens under a plan are those of a forward with one mask per KV head; all with vLLM's own scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CAPACITIES, MAX_MODEL_LEN, answers, prompts, save_plan
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.serving import Serving
from oracle import Oracle

TOLERANCE = 1e-4  # of log-probabilities in fp32
FIXED = {"retention": sum(map(sum, CAPACITIES)) / (6 * MAX_MODEL_LEN), "context_length": MAX_MODEL_LEN}
SINKS = 4


def layouts(tokens_per_block: int = MAX_MODEL_LEN, table: list[list[int]] = CAPACITIES) -> list[BlockLayout]:
    return [BlockLayout.of(row, tokens_per_block, SINKS, max_tokens=MAX_MODEL_LEN) for row in table]


def check(
    oracle: Oracle, asked: list[list[int]], found: list[tuple[list[int], torch.Tensor]], tolerance: float = TOLERANCE
) -> None:
    """Every token is the oracle's own choice behind the tokens before it, with the oracle's log-probability."""
    for prompt, (tokens, log_probabilities) in zip(asked, found, strict=True):
        picked = greedy(oracle, prompt, tokens, tolerance)
        assert float((picked - log_probabilities).abs().max()) < tolerance


def greedy(oracle: Oracle, prompt: list[int], tokens: list[int], tolerance: float = TOLERANCE) -> torch.Tensor:
    """The oracle's log-probabilities of the tokens, which must be the largest, up to rounding."""
    expected = oracle.log_probabilities(prompt + tokens)[len(prompt) - 1 : -1]
    picked = expected[torch.arange(len(tokens)), tokens]
    assert float((expected.amax(-1) - picked).max()) < tolerance
    return picked


def lengths(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 400, (count,), generator=generator).tolist()


@pytest.mark.parametrize("chunk", [16, 37, 64, 512])
def test_slab_equals_the_masked_forward(model: str, plan: str, engine: Any, chunk: int) -> None:
    llm = engine({"plan": plan, **FIXED}, max_num_batched_tokens=chunk)
    asked = prompts([150, 7, 40, 301, *lengths(46, chunk)])
    check(Oracle(model, layouts()), asked, answers(llm, asked, 20))


def test_a_budget_changes_the_answers(model: str, plan: str, engine: Any) -> None:
    asked = prompts([301])
    ((tokens, log_probabilities),) = answers(engine({"plan": plan, **FIXED}), asked, 20)
    dense = Oracle(model, None).log_probabilities(asked[0] + tokens)[len(asked[0]) - 1 : -1]
    assert float((dense[torch.arange(20), tokens] - log_probabilities).abs().max()) > 0.1


def test_full_budget_equals_vllm_without_a_plan(model: str, engine: Any, tmp_path: Path) -> None:
    asked = prompts([150, 7, 40, 301])
    full = save_plan(model, tmp_path / "full.json", [[MAX_MODEL_LEN] * 2] * 3)
    ours = answers(engine({"plan": full, "retention": 1.0, "context_length": MAX_MODEL_LEN}), asked, 40)
    dense = answers(engine(), asked, 40)
    for (tokens, log_probabilities), (expected, expected_log_probabilities) in zip(ours, dense, strict=True):
        assert tokens == expected
        assert float((log_probabilities - expected_log_probabilities).abs().max()) < TOLERANCE


def test_slabs_are_used_again_dirty(model: str, plan: str, engine: Any) -> None:
    llm = engine({"plan": plan, **FIXED}, num_gpu_blocks_override=3)  # one is vLLM's own: two requests at a time
    asked = prompts(lengths(12, 1))
    check(Oracle(model, layouts()), asked, answers(llm, asked, 20))


def test_tokens_come_one_by_one(model: str, plan: str, engine: Any) -> None:
    from vllm import SamplingParams

    llm = engine({"plan": plan, **FIXED}, max_num_batched_tokens=64).llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    asked, streams = prompts([90, 301]), {}
    llm.add_request("first", {"prompt_token_ids": asked[0]}, sampling)
    for step in range(200):
        if step == 9:  # joins while the other decodes
            llm.add_request("second", {"prompt_token_ids": asked[1]}, sampling)
        for output in llm.step():
            streams.setdefault(output.request_id, []).append(list(output.outputs[0].token_ids))
        if step > 9 and not llm.has_unfinished_requests():
            break
    oracle = Oracle(model, layouts())
    for name, prompt in zip(("first", "second"), asked, strict=True):
        assert [len(tokens) for tokens in streams[name]] == list(range(1, 31))
        greedy(oracle, prompt, streams[name][-1])


def test_engine_in_a_process_of_its_own(model: str, plan: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    asked = prompts([150, 7, 40, 301])
    check(Oracle(model, layouts()), asked, answers(engine({"plan": plan, **FIXED}), asked, 20))


def test_two_ranks_share_the_heads_of_a_layer(model: str, plan: str, engine: Any) -> None:
    """The blocks of both have the rows of the larger one."""
    llm = engine({"plan": plan, **FIXED}, tensor_parallel_size=2, distributed_executor_backend="mp")
    slots = Serving.of(llm.llm_engine.vllm_config).slots  # each rank has the same entries in all, over the layers
    asked = prompts([150, 7, 40, 301])
    check(Oracle(model, layouts(table=slots)), asked, answers(llm, asked, 20))


class Preemptions:
    """Counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        self.count, preempt = 0, Scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.count += 1
            preempt(*args, **kwargs)

        monkeypatch.setattr(Scheduler, "_preempt_request", counted)


@pytest.mark.parametrize("chunk", [16, 37, 64, 512])
def test_pages_equal_the_masked_forward(
    model: str, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    table = [[13, 40], [26, 19], [52, 10]]  # entries of a block of 64 tokens
    plan = save_plan(model, tmp_path / "plan.json", [[8 * slots for slots in row] for row in table])
    preemptions = Preemptions(monkeypatch)
    llm = engine(
        {"plan": plan, "retention": sum(map(sum, table)) / (6 * 64)},
        max_num_batched_tokens=chunk,
        num_gpu_blocks_override=10,  # nine for requests of up to seven each
    )
    asked = prompts([150, 7, 40, 301, 290, *lengths(45, chunk)])
    check(Oracle(model, layouts(64, table)), asked, answers(llm, asked, 40))
    assert preemptions.count > 0


def graph_options(graphs: str) -> dict[str, Any]:
    """Options of an engine; its chunks may be made smaller."""
    return {
        "max_num_batched_tokens": 512,
        "enforce_eager": graphs == "NONE",
        "compilation_config": {"mode": 0, "cudagraph_mode": graphs},
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 1 << 30,  # else vLLM measures what is free, which other processes change meanwhile
    }


def answers_in_chunks(llm: Any, requests: dict[int, int]) -> Iterator[tuple[list[list[int]], Any]]:
    """Prompts and what was found. requests: how many of them with each number of tokens that a step takes at most."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    for chunk, count in requests.items():
        scheduler.max_num_scheduled_tokens = chunk
        asked = prompts([301, *lengths(count - 1, chunk)])
        yield asked, answers(llm, asked, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["FULL_DECODE_ONLY", "NONE"], ids=["graphs", "eager"])
@pytest.mark.parametrize("tokens_per_block", [MAX_MODEL_LEN, 64])
def test_a_gpu_equals_the_masked_forward(
    model: str, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: str, tokens_per_block: int
) -> None:
    """One engine for all chunks, and 200 requests; those of growing blocks are preempted."""
    table = [[13, 40], [26, 19], [52, 10]]
    plan = save_plan(model, tmp_path / "plan.json", [[8 * slots for slots in row] for row in table])
    settings = {"plan": plan, "retention": sum(map(sum, table)) / (6 * 64)}
    is_slab = tokens_per_block == MAX_MODEL_LEN
    if is_slab:
        settings["context_length"] = MAX_MODEL_LEN
        table = [[8 * slots for slots in row] for row in table]
    preemptions = Preemptions(monkeypatch)
    llm = engine(settings, num_gpu_blocks_override=6 if is_slab else 10, **graph_options(graphs))
    oracle = Oracle(model, layouts(tokens_per_block, table))
    for asked, found in answers_in_chunks(llm, {16: 20, 37: 40, 64: 60, 512: 80}):
        check(oracle, asked, found, tolerance=1e-3)
    assert is_slab or preemptions.count > 0


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["FULL_DECODE_ONLY", "NONE"], ids=["graphs", "eager"])
def test_on_a_gpu_a_full_budget_equals_vllm_without_a_plan(
    model: str, engine: Any, tmp_path: Path, graphs: str
) -> None:
    """Both are a forward over everything; vLLM's own attention may multiply in tf32."""
    full = save_plan(model, tmp_path / "full.json", [[MAX_MODEL_LEN] * 2] * 3)
    oracle = Oracle(model, None)
    settings = {"plan": full, "retention": 1.0, "context_length": MAX_MODEL_LEN}
    for given, tolerance in ((settings, 1e-3), (None, 0.1)):
        llm = engine(given, **graph_options(graphs))
        for asked, found in answers_in_chunks(llm, {37: 4, 512: 4}):
            check(oracle, asked, found, tolerance)
