"""Which tokens a block keeps, and where, against lists that are written and evicted one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import on_a_gpu
from kvpolicy_vllm import self_check
from kvpolicy_vllm.attend import BlockAttention
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.steps import LayerTables

TOKENS = 400
# entries of a block, its tokens, sink tokens: a slab, slabs that hold all, blocks whose ring is shorter than a block
CASES = [(7, 1000, 4), (400, 400, 4), (5, 16, 4), (16, 16, 0), (9, 32, 4), (6, 64, 4), (33, 64, 4), (1, 8, 0)]


def token_by_token(slots: int, tokens_per_block: int, num_sinks: int) -> Iterator[tuple[list[int], int]]:
    """After each token what is kept, and the slot that it took."""
    kept: list[int] = []
    place: dict[int, int] = {}
    free: list[int] = []
    for token in range(TOKENS):
        if token % tokens_per_block == 0:
            begin = token // tokens_per_block * slots
            free += range(begin, begin + slots)
        if free:
            place[token] = free.pop(0)
        else:
            oldest = min(other for other in kept if other >= num_sinks)
            kept.remove(oldest)
            place[token] = place[oldest]
        kept.append(token)
        yield sorted(kept), place[token]


@pytest.mark.parametrize(("slots", "tokens_per_block", "num_sinks"), CASES)
def test_positions_say_what_is_kept_and_where(slots: int, tokens_per_block: int, num_sinks: int) -> None:
    layout = BlockLayout.of([slots, slots], tokens_per_block, num_sinks, max_tokens=TOKENS)
    at = torch.arange(TOKENS)
    oldest, slot, lengths = layout.oldest(at)[1], layout.slot(at)[1], layout.lengths(at + 1)[1]
    for token, (kept, place) in enumerate(token_by_token(slots, tokens_per_block, num_sinks)):
        assert [t for t in range(token + 1) if t < num_sinks or t >= oldest[token]] == kept
        assert slot[token] == place
        assert lengths[token] == len(kept)
    assert layout.lengths(torch.tensor([0])).tolist() == [[0], [0]]


def last_kept(slots: int) -> list[int]:
    """Tokens in blocks of 64 with four sinks."""
    *_, (kept, _) = token_by_token(slots, 64, 4)
    return kept


def test_rows_of_heads_and_blocks_are_apart() -> None:
    layout = BlockLayout.of([5, 20], 64, 4, max_tokens=TOKENS, rows=40)
    blocks = torch.randperm(9)[: layout.num_blocks]
    tokens = [torch.tensor(kept) for kept in (last_kept(5), last_kept(20))]
    heads = torch.cat([torch.full_like(kept, head) for head, kept in enumerate(tokens)])
    rows = layout.rows_of(blocks, heads, torch.cat(tokens))
    assert layout.rows == 40 and len(rows.unique()) == rows.numel() and int(rows.max()) < 9 * 40


@pytest.mark.parametrize(("device", "softcap"), [("cpu", None), ("cpu", 5.0), on_a_gpu("cuda", None)])
@pytest.mark.parametrize(("slots", "tokens_per_block"), [((16, 64), 512), ((20, 9), 64)])
@pytest.mark.parametrize("chunk", [1, 16, 37, 200])
def test_chunks_and_single_tokens_attend_alike(
    slots: tuple[int, int], tokens_per_block: int, softcap: float | None, chunk: int, device: str
) -> None:
    torch.manual_seed(0)
    layout = BlockLayout.of(slots, tokens_per_block, 4, max_tokens=512, device=device)
    attention = BlockAttention(layout, 0.25, softcap)
    query, key, value = (torch.randn(300, heads, 32).to(device) for heads in (4, 2, 2))
    answers = []
    for size in (chunk, 300):
        cache = torch.full((10, layout.rows, 2, 32), 1e4, device=device)  # what lay there before
        blocks = torch.randperm(9)[: layout.num_blocks].to(device) + 1
        tables = LayerTables([layout], 32)
        parts = [
            attention.chunk(*(x[begin : begin + size] for x in (query, key, value)), cache, blocks, begin)
            if size > 1
            else attention.decode(
                *(x[begin : begin + 1] for x in (query, key, value)),
                cache,
                *tables.step(blocks[None], torch.tensor([begin + 1], device=device)),
            )
            for begin in range(0, 300, size)
        ]
        answers.append(torch.cat(parts))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens_per_block", [512, 64])
def test_layers_together_are_the_layers_alone(tokens_per_block: int) -> None:
    tables = [[16, 64], [40, 12], [60, 24]]
    layouts = [
        BlockLayout.of(slots, tokens_per_block, 4, max_tokens=512, rows=rows)
        for slots, rows in zip(tables, (0, 90, 0), strict=True)
    ]
    counts = torch.tensor([1, 63, 65, 0, 400])
    blocks = torch.randperm(40)[: 5 * layouts[0].num_blocks].view(5, -1)
    padded = torch.nn.functional.pad(blocks, (0, 3), value=39)
    for layout, step in zip(layouts, LayerTables(layouts, 16).step(padded, counts), strict=True):
        assert step.lengths.view(5, 2).tolist() == layout.lengths(counts).t().tolist()
        for request, count in enumerate(counts.tolist()):
            if count:
                rows = layout.rows_of(blocks[request], torch.arange(2), torch.tensor([count - 1] * 2))
                assert step.rows.view(5, 2)[request].tolist() == rows.tolist()
        assert torch.equal(step.blocks, blocks)
        assert (step.starts is None) == (layout.num_blocks > 1)
        if step.starts is not None:
            begins = blocks * layout.rows + layout.offsets
            assert torch.equal(step.starts.view(5, 2)[counts > 0], begins[counts > 0])


def test_a_row_of_no_request_touches_nobody() -> None:
    layout = BlockLayout.of([8, 8], 64, 4, max_tokens=64)
    cache = torch.randn(3, 16, 2, 16)
    before = cache.clone()
    new = torch.randn(2, 4, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    step = LayerTables([layout], 16).step(torch.tensor([[2], [77]]), torch.tensor([1, 0]))
    out = BlockAttention(layout, 0.25).decode(*new, cache, *step)
    assert torch.equal(cache[1], before[1]) and not torch.equal(cache[2], before[2])
    assert torch.equal(out[1], torch.zeros(4, 16))


def test_self_check_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    check = self_check.check_attention.__wrapped__
    check(torch.device("cpu"), torch.float32, 64)
    check(torch.device("cpu"), torch.bfloat16, 128)
    oldest = BlockLayout.oldest
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="attends wrongly on cpu"):
        patch.setattr(BlockLayout, "slot", lambda self, at: at % self.slots[:, None])
        check(torch.device("cpu"), torch.float32, 64)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="attends"):
        patch.setattr(BlockLayout, "oldest", lambda self, at: oldest(self, at) * 0)
        check(torch.device("cpu"), torch.float32, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 32), (torch.bfloat16, 128), (torch.float16, 128)])
def test_attention_holds_on_a_gpu(dtype: torch.dtype, dim: int) -> None:
    self_check.check_attention.__wrapped__(torch.device("cuda"), dtype, dim)


@pytest.mark.gpu
@pytest.mark.parametrize(("slots", "tokens_per_block"), [((160, 40), 4096), ((51, 20), 256)])
def test_a_step_of_single_tokens_fits_a_graph(slots: tuple[int, int], tokens_per_block: int) -> None:
    device = torch.device("cuda")
    layout = BlockLayout.of(slots, tokens_per_block, 4, max_tokens=4096, device=device)
    attention, tables = BlockAttention(layout, 0.125), LayerTables([layout], 128)
    caches = [torch.zeros(40, layout.rows, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    blocks = torch.arange(1, 1 + 2 * layout.num_blocks, device=device).view(2, -1)
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    new = [torch.zeros(2, heads, 128, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    for _ in range(2):
        attention.decode(*new, caches[0], *tables.step(blocks, counts))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.decode(*new, caches[0], *tables.step(blocks, counts))
    caches[0].zero_()
    for step in range(300):
        counts.copy_(torch.tensor([step + 1, max(0, step - 100)]))
        for tensor in new:
            tensor.normal_()
        graph.replay()
        torch.testing.assert_close(out, attention.decode(*new, caches[1], *tables.step(blocks, counts)))
