"""Policies that look at the content: cut at fixed positions, whatever the chunks and the neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAX_MODEL_LEN, answers, on_a_gpu, prompts, save_plan
from kvpolicy_vllm import cuts, observation, self_check
from kvpolicy_vllm.attend import BlockAttention
from kvpolicy_vllm.cuts import CutAttention, CutLayout
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.observation import Observation
from kvpolicy_vllm.serving import Serving
from kvpolicy_vllm.steps import LayerTables
from oracle import Oracle, seen_by_cuts
from test_oracle import answers_in_chunks, check, graph_options

import kvpolicy
from kvpolicy.budget.plan import PlanChoice

POLICIES = [
    ("keydiff", {"num_sink_tokens": 4, "recent_window": 8}),
    ("l2norm", {"num_skipped_layers": 1, "recent_window": 8}),
    ("snapkv", {"observation_window": 8, "recent_window": 8, "num_sink_tokens": 2, "kernel_size": 3}),
]
CAPACITIES = [[64, 120], [90, 72], [MAX_MODEL_LEN, 100]]
PERIOD = 16


def layout_of(slots: list[int], policy: kvpolicy.EvictionPolicy, device: str = "cpu") -> CutLayout:
    """Of a layer of four query heads of 32 numbers."""
    slots = [n + PERIOD * (n == MAX_MODEL_LEN) for n in slots]
    window, rows, observation = 0, sum(slots), None
    if "window_attention" in policy.requires:
        window = policy.observation_window
        rows += Observation.size(slots, window, 4, 32)
        observation = Observation.behind(slots, rows, window, 4, 32, device)
    plain = BlockLayout.of(
        slots, MAX_MODEL_LEN, policy.num_sink_tokens, max_tokens=MAX_MODEL_LEN, rows=rows, device=device
    )
    return CutLayout.every(PERIOD, plain, observation)


@pytest.mark.parametrize("device", ["cpu", on_a_gpu("cuda")])
@pytest.mark.parametrize(("name", "params"), POLICIES)
@pytest.mark.parametrize("chunk", [1, 16, 37, 300])
def test_chunks_and_single_tokens_attend_to_what_the_cuts_left(
    name: str, params: dict[str, int], chunk: int, device: str
) -> None:
    torch.manual_seed(0)
    policy = kvpolicy.registry.create("policy", name, params)
    layout = layout_of([64, 90], policy, device)
    observations = [] if layout.observation is None else [layout.observation]
    attention = CutAttention(layout=layout, scale=0.25, policy=policy, layer=2)
    tables = LayerTables([layout], 32, observations)
    query, key, value = (torch.randn(300, heads, 32).to(device) for heads in (4, 2, 2))
    cache = torch.full((4, layout.rows, 2, 32), 1e4, device=device)  # what lay there before
    blocks = torch.tensor([2], device=device)
    parts = []
    for begin in range(0, 300, chunk):
        q, k, v = (x[begin : begin + chunk] for x in (query, key, value))
        if chunk > 1:
            parts.append(attention.chunk(q, k, v, cache, blocks, begin))
        else:
            attention.cut(cache, blocks, begin)
            parts.append(
                attention.decode(q, k, v, cache, *tables.step(blocks[None], torch.tensor([begin + 1], device=device)))
            )
    out, query, key, value = torch.cat(parts).cpu(), query.cpu(), key.cpu(), value.cpu()
    queries = query.transpose(0, 1).unflatten(0, (2, 2))
    heads = zip(queries, key.transpose(0, 1), layout.slots.tolist(), strict=True)
    seen = torch.stack([seen_by_cuts(policy, 2, q, k, n, PERIOD, 0.25) for q, k, n in heads]).repeat_interleave(2, 0)
    q, k, v = (x.transpose(0, 1) for x in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.25)
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=1e-4)
    assert int(layout.lengths(torch.arange(301, device=device)).max()) == 90  # never more than the capacity


def pretended(x: torch.Tensor) -> torch.Tensor:
    """Of the shape, without numbers that the host could read."""
    return torch.empty_like(x, device="meta")


@pytest.mark.parametrize(("name", "params"), POLICIES)
def test_a_cut_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, name: str, params: dict[str, int]) -> None:
    """Nor copies to it what the host works out. The kernels are taken away."""
    policy = kvpolicy.registry.create("policy", name, params)
    moved: list[tuple[int, ...]] = []
    monkeypatch.setattr(cuts, "compact_in_place", lambda arenas, starts, columns, kept: moved.append(columns.shape))
    monkeypatch.setattr(
        observation,
        "column_scores",
        lambda query, segments, chunk, longest, **_: query.new_empty(len(segments), 1, longest + len(chunk)),
    )
    attention = CutAttention(layout=layout_of([64, 200, 90, 300], policy), scale=0.25, policy=policy, layer=2)
    layout = attention.by_size
    if layout.observation is not None:
        layout = replace(layout, observation=replace(layout.observation, places=pretended(attention.heads)))
    layout = replace(layout, slots=pretended(layout.slots), offsets=pretended(layout.offsets))
    moved_to = {"by_size": layout, "layout": layout, "heads": pretended(attention.heads), "at": pretended(attention.at)}
    for field, value in moved_to.items():
        object.__setattr__(attention, field, value)
    cache, blocks = torch.empty(4, layout.rows, 2, 32, device="meta"), torch.ones(1, device="meta")
    monkeypatch.setattr(torch.Tensor, "to", None)
    for count in range(1, 130):
        attention.cut(cache, blocks, count)
    # from the first token that a head has no room for, and of heads that are not full yet none
    assert moved == [(1, 48), (2, 74), (2, 74), (2, 74), (2, 74)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "params"), POLICIES)
def test_a_gpu_is_not_waited_for(name: str, params: dict[str, int]) -> None:
    policy = kvpolicy.registry.create("policy", name, params)
    attention = CutAttention(layout=layout_of([64, 90], policy, "cuda"), scale=0.25, policy=policy, layer=2)
    cache = torch.zeros(4, attention.layout.rows, 2, 32, device="cuda")
    new = [torch.randn(150, heads, 32, device="cuda") for heads in (4, 2, 2)]
    blocks = torch.tensor([2], device="cuda")
    attention.chunk(*new, cache, blocks, 0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # the first time cuts are recorded
            attention.chunk(*new, cache, blocks, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", on_a_gpu("cuda")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "params"), [*POLICIES, *((name, {}) for name, _ in POLICIES)])
def test_self_check_holds(name: str, params: dict[str, int], dtype: torch.dtype, device: str) -> None:
    policy = kvpolicy.registry.create("policy", name, params)
    self_check.check_cuts.__wrapped__(torch.device(device), dtype, 128, policy, 2)


def test_self_check_notices_another_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = kvpolicy.registry.create("policy", "keydiff", {})
    columns = CutAttention._columns
    monkeypatch.setattr(CutAttention, "_columns", lambda *args: columns(*args) * 0 + torch.arange(args[-1]))
    with pytest.raises(RuntimeError, match="attends wrongly on cpu"):
        self_check.check_cuts.__wrapped__(torch.device("cpu"), torch.float32, 64, policy, 2)


def test_a_whole_budget_is_never_cut() -> None:
    torch.manual_seed(0)
    policy = kvpolicy.registry.create("policy", "keydiff", {})
    plain = BlockLayout.of([MAX_MODEL_LEN] * 2, MAX_MODEL_LEN, 0, max_tokens=MAX_MODEL_LEN)
    cut = layout_of([MAX_MODEL_LEN] * 2, policy)
    new = torch.randn(300, 4, 16), torch.randn(300, 2, 16), torch.randn(300, 2, 16)
    outs = [
        attention.chunk(*new, torch.zeros(3, attention.layout.rows, 2, 16), torch.tensor([1]), 0)
        for attention in (BlockAttention(plain, 0.25), CutAttention(layout=cut, scale=0.25, policy=policy, layer=0))
    ]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize(("name", "params", "chunk"), [(*POLICIES[0], 37), (*POLICIES[1], 64), (*POLICIES[2], 37)])
def test_an_engine_equals_the_masked_forward(
    model: str, engine: Any, tmp_path: Path, name: str, params: dict[str, int], chunk: int
) -> None:
    plan = save_plan(model, tmp_path / "plan.json", CAPACITIES, policy=PlanChoice(name, params))
    retention = sum(map(sum, CAPACITIES)) / (6 * MAX_MODEL_LEN)
    llm = engine(
        {"plan": plan, "retention": retention, "context_length": MAX_MODEL_LEN},
        max_num_batched_tokens=chunk,
        num_gpu_blocks_override=4,  # three requests at a time, in slabs that others have used
    )
    asked = prompts([150, 7, 40, 301, 64, 290])
    policy = kvpolicy.registry.create("policy", name, params)
    layouts = [layout_of(row, policy) for row in CAPACITIES]
    check(Oracle(model, layouts, policy), asked, answers(llm, asked, 20))


def test_two_ranks_cut_their_own_heads(model: str, engine: Any, tmp_path: Path) -> None:
    name, params = POLICIES[2]
    table = [[80, 120], [90, 72], [110, 100]]
    plan = save_plan(model, tmp_path / "plan.json", table, policy=PlanChoice(name, params))
    llm = engine(
        {"plan": plan, "retention": sum(map(sum, table)) / (6 * MAX_MODEL_LEN), "context_length": MAX_MODEL_LEN},
        max_num_batched_tokens=37,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    serving = Serving.of(llm.llm_engine.vllm_config)
    assert serving.period == PERIOD
    policy = kvpolicy.registry.create("policy", name, params)
    oracle = Oracle(model, [layout_of(list(row), policy) for row in serving.slots], policy)
    asked = prompts([150, 40, 301])
    check(oracle, asked, answers(llm, asked, 20))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "params"), POLICIES[::2])
def test_a_gpu_cuts_between_the_steps_of_a_graph(
    model: str, engine: Any, tmp_path: Path, name: str, params: dict[str, int]
) -> None:
    plan = save_plan(model, tmp_path / "plan.json", CAPACITIES, policy=PlanChoice(name, params))
    llm = engine(
        {"plan": plan, "retention": sum(map(sum, CAPACITIES)) / (6 * MAX_MODEL_LEN), "context_length": MAX_MODEL_LEN},
        num_gpu_blocks_override=4,
        **graph_options("FULL_DECODE_ONLY"),
    )
    policy = kvpolicy.registry.create("policy", name, params)
    oracle = Oracle(model, [layout_of(row, policy) for row in CAPACITIES], policy)
    for asked, found in answers_in_chunks(llm, {37: 4, 512: 4}):
        check(oracle, asked, found, tolerance=1e-3)
