"""Tokens that may be taken back: pending ones, and those after the last eviction."""

import pytest
import torch

from kvpolicy import BudgetError
from kvpolicy.budget.ask import Ask
from tests.cache.play import Play
from tests.cache.policies import Coarse, HeavyHitter, KeyNorm, LastQueries, Recent, ValueNorm
from tests.cache.snapshot import snapshot

POLICIES = [Recent(), ValueNorm(recent_window=2), KeyNorm(), Coarse(), HeavyHitter(1), LastQueries()]
EACH = pytest.mark.parametrize("policy", POLICIES, ids=str)
SPANS = pytest.mark.parametrize("spans", [(), [(3, 6), (18, 30)]], ids=["no spans", "spans"])


@SPANS
@EACH
def test_pending_tokens_follow_the_oracle_over_several_chunks(policy, spans):
    play = Play(policy, [6, 9], spans=spans, tokens=80).prompt(20, hold=5)
    assert len(play.store.layers[0].pending) == 5
    for count in (1, 3, 1, 6, 2):
        play.prompt(count, hold=5)
    play.prompt(2, hold=3).prompt(4).decode(6)
    assert play.store.layers[0].pending is None


@SPANS
@EACH
def test_taking_back_pending_tokens(policy, spans):
    play = Play(policy, [6, 9], spans=spans, tokens=80).prompt(20, hold=5)
    for count, back in ((4, 3), (1, 0), (1, 1), (6, 5), (3, 0), (5, 2)):
        play.prompt(count, hold=5).crop(back)
    play.prompt(3).decode(5)


@SPANS
@EACH
def test_a_chunk_that_stays_pending_and_is_taken_back_was_never_there(policy, spans):
    play = Play(policy, [6, 9], spans=spans).prompt(20).decode(3)
    before = snapshot(play.store)
    lengths = play.store.lengths
    play.prompt(5, hold=9)
    assert torch.equal(play.store.lengths, lengths + 5)
    play.crop(5)
    assert snapshot(play.store) == before
    assert not play.store.layers[0].pending
    play.decode(4)


def test_a_chunk_as_long_as_it_is_held_is_all_pending():
    play = Play(ValueNorm(), [6, 9]).prompt(5, hold=5)
    assert play.store.lengths[0, 0].tolist() == [5, 5]
    assert not play.store.can_append(0)
    play.crop(2).prompt(1, hold=5).crop(4)
    assert play.store.seen.tolist() == [0]
    play.prompt(12, hold=1).crop(1).prompt(2)


@EACH
def test_tokens_behind_the_last_eviction_can_be_taken_back(policy):
    play = Play(policy, [12, 30]).prompt(5).decode(6).crop(4)
    assert play.store.seen.tolist() == [7]
    assert [sorted(p.tolist()) for p in play.store.positions(0)] == [list(range(7))] * 2
    if not isinstance(policy, HeavyHitter):  # its sums keep what the removed queries added
        play.decode(9).prompt(3)


def test_everything_can_be_taken_back_where_nothing_was_evicted():
    play = Play(Recent(), [12, 30]).prompt(5).decode(2).crop(7)
    assert play.store.lengths.sum() == 0
    assert not play.store.lengths.any()
    play.prompt(14).decode(3)


def test_padded_rows_are_cropped_by_columns_of_pending_tokens():
    play = Play(ValueNorm(), [5, 7], batch=2).prompt(9, 12)
    before = snapshot(play.store)
    play.prompt(4, 2, hold=4)
    play.store.crop(3)
    assert play.store.seen.tolist() == [10, 12]
    play.store.crop(1)
    assert snapshot(play.store) == before


@EACH
def test_a_refused_crop_changes_nothing(policy):
    play = Play(policy, [6, 9], spans=[(3, 5)]).prompt(7).decode(5).prompt(9, hold=4)
    before = snapshot(play.store)
    with pytest.raises(
        BudgetError, match=r"the last 5 tokens cannot be taken back, only 4: entries were evicted since"
    ):
        play.store.crop(5)
    assert snapshot(play.store) == before
    play.crop(4)
    with pytest.raises(BudgetError, match="the last 1 tokens cannot be taken back, only 0"):
        play.store.crop(1)
    play.prompt(2, hold=4).prompt(1).decode(2)


def test_a_crop_is_refused_in_every_layer_or_in_none():
    from tests.cache.play import store_of, tensors

    store, (query, key, value) = store_of(Recent(), [[30, 30], [6, 9]]), tensors(12)
    for layer in range(2):
        store.prefill(layer, *(x[:, :, :6] for x in (query, key, value)))
    for t in range(6, 8):
        for layer in range(2):
            store.decode(layer, *(x[:, :, t : t + 1] for x in (query, key, value)))
    before = snapshot(store)
    with pytest.raises(BudgetError, match="only 0"):
        store.crop(1)
    assert snapshot(store) == before


def test_a_row_that_has_evicted_decides_for_the_batch():
    play = Play(Recent(), [12, 14], batch=2).prompt(9, 3).decode(6)
    with pytest.raises(BudgetError, match="only 0"):
        play.store.crop(1)


@pytest.mark.parametrize(
    ("count", "error"), [(13, "the last 13 tokens cannot be taken back, only 12: there are no more"), (-1, "got -1")]
)
def test_crops_of_more_than_there_is(count, error):
    play = Play(Recent(), [20, 20]).prompt(12)
    with pytest.raises(BudgetError, match=error):
        play.store.crop(count)


def test_capacities_grow_with_tokens_that_can_no_longer_be_taken_back():
    from kvpolicy.cache.schedule import Growing

    growing = Growing((1, 2), lambda kept, context: torch.tensor([[1.0, 2.0]]), Ask(0.5, min_tokens=8), 3)
    play = Play(Recent(), growing).prompt(20, hold=8)
    assert play.store.capacities.sum() == 16, "12 tokens are settled: the least mean of 8 is still more than half"
    play.prompt(10, hold=8)
    assert play.store.capacities.sum() == 22
    before = play.store.capacities
    play.crop(8).prompt(4, hold=8)
    assert torch.equal(play.store.capacities, before)
