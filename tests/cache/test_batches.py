"""Rows of a batch are what they are alone: padding, different lengths, beams, selection."""

import pytest
import torch

from tests.cache.play import GROUP, TOLERANCE, Play, store_of, tensors
from tests.cache.policies import Coarse, HeavyHitter, KeyNorm, LastQueries, Recent, ValueNorm

POLICIES = [Recent(), ValueNorm(recent_window=2), KeyNorm(), Coarse(), HeavyHitter(1), LastQueries()]
EACH = pytest.mark.parametrize("policy", POLICIES, ids=str)
SPANS = pytest.mark.parametrize("spans", [(), [(3, 6), (14, 20)]], ids=["no spans", "spans"])


@SPANS
@EACH
def test_left_padded_rows(policy, spans):
    """The oracle of each row knows nothing of the others."""
    Play(policy, [6, 9], batch=3, spans=spans).prompt(13, 4, 20).decode(20)


@SPANS
@EACH
def test_padding_in_later_prompts(policy, spans):
    play = Play(policy, [6, 9], batch=3, spans=spans)
    play.prompt(13, 4, 9).decode(3).prompt(2, 8, 5).decode(3).prompt(5, 1, 1).decode(6)


@EACH
def test_a_row_without_a_token(policy):
    Play(policy, [6, 9], batch=3).prompt(5, 0, 9).decode(8).prompt(0, 12, 3).decode(4)


@pytest.mark.parametrize("policy", [Recent(), ValueNorm(recent_window=2), Coarse(), HeavyHitter(1)], ids=str)
def test_padding_between_and_behind_tokens(policy):
    valid = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    play = Play(policy, [5, 7], batch=2).prompt(4, 5, valid=valid).decode(5)
    play.prompt(3, 3, valid=torch.tensor([[1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()).decode(4)


def test_prefill_takes_the_number_of_padding_tokens():
    given = tensors(9)
    padded = tuple(torch.cat([torch.full_like(x[:, :, :3], 1e3), x], 2) for x in given)
    alone, store = store_of(Recent(), [5, 7]), store_of(Recent(), [5, 7])
    expected = alone.prefill(0, *given)
    for num_padding in ([3], torch.tensor([3])):
        store = store_of(Recent(), [5, 7])
        out = store.prefill(0, *padded, num_padding=num_padding)
        torch.testing.assert_close(out[:, :, 3:], expected, **TOLERANCE)
        assert store.seen.tolist() == [9]
        assert [p.tolist() for p in store.positions(0)] == [p.tolist() for p in alone.positions(0)]


@EACH
@pytest.mark.parametrize(
    "rows", [[2, 0, 1], [1, 1, 0, 2, 2, 2], [2], [0, 2], [1, 1, 1]], ids=["reorder", "repeat", "one", "two", "beams"]
)
def test_rows_are_taken_with_all_they_have(policy, rows):
    play = Play(policy, [6, 9], batch=3).prompt(13, 4, 20).decode(4).take(*rows).decode(7)
    play.prompt(*range(1, len(rows) + 1)).decode(2)
    assert play.store.batch_size == len(rows)


def test_beams_go_apart_after_they_were_taken():
    play = Play(HeavyHitter(1), [5, 6], batch=2).prompt(9).take(0, 0)
    play.data = tuple(torch.cat([x[:1], y[:1]]) for x, y in zip(play.data, tensors(64, seed=9), strict=True))
    for row, index in zip(play.rows, (0, 1), strict=True):
        past = row.seen
        for name, x in zip(("query", "key", "value"), play.data, strict=True):
            setattr(row, name, torch.cat([getattr(row, name)[:, :past], x[index, :, past:]], 1))
    for x, name in zip(play.data, ("query", "key", "value"), strict=True):
        x.copy_(torch.stack([getattr(row, name) for row in play.rows]))
    play.decode(6).prompt(30)
    held = [sorted(p.tolist()) for p in play.store.positions(0)]
    assert held[0] != held[2] or held[1] != held[3], "the two beams saw different tokens"


def test_pending_tokens_are_taken_too():
    play = Play(ValueNorm(), [5, 7], batch=2).prompt(12, hold=4).take(1, 1, 0).prompt(3, hold=4).prompt(2).decode(3)
    assert play.store.lengths[0, 0].tolist() == [5, 7]


def test_a_batch_of_heads_is_laid_out_as_queries_are():
    """Two rows of two KV heads of equal keys: each query head sees its own values."""
    key = torch.ones(2, 2, 3, 8)
    value = torch.arange(4.0).view(2, 2, 1, 1).expand(-1, -1, 3, 6).contiguous()
    out = store_of(Recent(), [5, 5], batch_size=2).prefill(0, torch.ones(2, 2 * GROUP, 3, 8), key, value)
    assert out[:, :, 0, 0].tolist() == [[0] * GROUP + [1] * GROUP, [2] * GROUP + [3] * GROUP]
