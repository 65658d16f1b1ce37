"""Any table, any prompts, chunks, steps back and protected spans: the store does what the oracle does.

`Play` compares outputs, kept tokens, capacities, lengths and slack after every step.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.budget.ask import Ask
from kvpolicy.cache.schedule import Growing
from tests.cache.play import Play
from tests.cache.policies import Coarse, KeyNorm, Recent, ValueNorm

TOKENS = 60


@st.composite
def games(draw):
    """(arguments of `Play`, steps)."""
    sinks = draw(st.integers(0, 4))
    heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    recent = draw(st.integers(0, 5))
    policy = draw(
        st.sampled_from([Recent(sinks), Coarse(sinks, recent), ValueNorm(sinks, recent), KeyNorm(sinks, recent)])
    )
    table = draw(st.lists(st.integers(sinks + 1, 20), min_size=heads, max_size=heads))
    if draw(st.booleans()):
        table = _growing(table, draw(st.floats(0.1, 0.9)), draw(st.integers(1, 12)))
    starts = draw(st.lists(st.integers(0, 30), max_size=2))
    spans = [(start, start + draw(st.integers(1, 9))) for start in starts]
    decode = draw(st.sampled_from(["evict", "evict", "append"]))
    options = {"batch": batch, "spans": spans, "decode": decode, "tokens": TOKENS, "seed": draw(st.integers(0, 99))}
    hold = st.integers(0, 6) if batch == 1 else st.just(0)
    prompt = st.tuples(st.just("prompt"), st.lists(st.integers(0, 12), min_size=batch, max_size=batch), hold)
    steps = st.one_of(
        prompt, st.tuples(st.just("decode"), st.integers(1, 8)), st.tuples(st.just("crop"), st.integers(1, 6))
    )
    first = st.tuples(st.just("prompt"), st.lists(st.integers(1, 20), min_size=batch, max_size=batch), hold)
    return policy, table, options, [draw(first), *draw(st.lists(steps, max_size=5))]


def _growing(shares, retention, min_tokens):
    return Growing(
        (1, len(shares)), lambda kept, context: torch.tensor([shares]), Ask(retention, min_tokens=min_tokens), 1
    )


@settings(max_examples=150, deadline=None)
@given(games())
def test_a_store_does_what_the_oracle_does(game):
    policy, table, options, steps = game
    play = Play(policy, table, **options)
    for name, *arguments in steps:
        pending = play.store.layers[0] and play.store.layers[0].pending
        if name == "prompt":
            counts, hold = arguments
            if max(counts) and max(row.seen for row in play.rows) + max(counts) <= TOKENS:
                play.prompt(*counts, hold=hold)
        elif name == "crop":
            play.crop(min(arguments[0], len(pending) if pending else 0))
        elif play.store.can_append(0):
            play.decode(min(arguments[0], TOKENS - max(row.seen for row in play.rows)))
        else:
            assert pending or max(row.seen for row in play.rows) == 0


@settings(max_examples=40, deadline=None)
@given(games(), st.lists(st.integers(0, 1), min_size=1, max_size=3))
def test_taken_rows_go_on_as_they_were(game, rows):
    policy, table, options, steps = game
    play = Play(policy, table, **(options | {"batch": 2, "tokens": 40}))
    play.prompt(steps[0][1][0], 7).take(*rows)
    play.prompt(*range(3, 3 + len(rows))).decode(3)
