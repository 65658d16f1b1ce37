"""Policies that score: what is kept and what is attended to, against the oracle, token by token."""

import pytest
import torch

from kvpolicy.budget.ask import Ask
from kvpolicy.cache.schedule import Growing
from tests.cache.play import Play
from tests.cache.policies import Coarse, HeavyHitter, KeyNorm, LastQueries, Recent, ValueNorm

POLICIES = [
    ValueNorm(),
    ValueNorm(recent_window=4),
    ValueNorm(0),
    KeyNorm(),
    KeyNorm(0, recent_window=2),
    Coarse(),
    HeavyHitter(),
    HeavyHitter(2, recent_window=3),
    LastQueries(),
    Recent(),
]
EACH = pytest.mark.parametrize("policy", POLICIES, ids=str)


@EACH
def test_a_prompt_and_decoding(policy):
    Play(policy, [6, 11]).prompt(20).decode(25)


@EACH
def test_a_prompt_that_fits_and_decoding_over_the_edge(policy):
    Play(policy, [6, 40]).prompt(4).decode(25)


@EACH
def test_chunks_second_prompts_and_decoding(policy):
    Play(policy, [7, 12]).prompt(9).prompt(9).prompt(1).decode(4).prompt(6).decode(7).prompt(17).decode(5)


@EACH
def test_a_capacity_smaller_than_the_recent_window(policy):
    Play(policy, [3, 4]).prompt(12).decode(9).prompt(3)


@EACH
def test_decoded_tokens_stay_until_the_next_prompt(policy):
    play = Play(policy, [6, 9], decode="append").prompt(20).decode(21)
    assert play.store.lengths.tolist() == [[[27, 30]]]
    play.prompt(5).decode(3)
    assert play.store.lengths.tolist() == [[[9, 12]]]


SPANS = {
    "in the prompt": [(4, 9)],
    "over the sink tokens": [(0, 6)],
    "from the prompt into decoded tokens": [(16, 26)],
    "in decoded tokens": [(23, 25), (30, 32)],
    "touching and overlapping": [(3, 5), (5, 6), (5, 8)],
}


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
@EACH
def test_protected_spans_stay_on_top_of_the_capacity(policy, spans):
    play = Play(policy, [6, 11], spans=spans).prompt(20).decode(22)
    inside = {p for begin, end in spans for p in range(begin, end)}
    for held in play.store.positions(0):
        assert inside <= set(held.tolist())
    on_top = len(inside - set(range(policy.num_sink_tokens)))
    assert play.store.lengths.tolist() == [[[6 + on_top, 11 + on_top]]]
    play.prompt(10).decode(4)


def test_the_policies_differ_so_that_the_oracle_can_fail():
    kept = {str(policy): sorted(Play(policy, [6, 11]).prompt(20).store.positions(0)[1].tolist()) for policy in POLICIES}
    assert len({tuple(positions) for positions in kept.values()}) >= 7


@pytest.mark.parametrize("policy", [Recent(), ValueNorm(), ValueNorm(recent_window=5)], ids=str)
def test_nothing_is_searched_for_where_scores_stay(monkeypatch, policy):
    """Behind the prompt it is known what will leave, also where budgets grow; the oracle says that it is right."""

    def search(*_, **__):
        raise AssertionError("a search for the worst entry")

    monkeypatch.setattr("kvpolicy.cache.layer.evict", search)
    monkeypatch.setattr("kvpolicy.cache.store_decoding.GROWTH_INTERVAL", 4)
    monkeypatch.setattr("tests.cache.oracle.GROWTH_INTERVAL", 4)
    schedule = Growing((1, 2), lambda kept, context: torch.tensor([[1.0, 3.0]]), Ask(0.3, min_tokens=10), 3)
    Play(policy, schedule, tokens=100).prompt(40).decode(60)
    Play(policy, [6, 11]).prompt(20).decode(25)
