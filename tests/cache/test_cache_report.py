"""The report of a store."""

import dataclasses

import torch

from kvpolicy.budget.ask import Ask
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import UNLIMITED, Fixed, Growing
from tests.cache.play import Play, spec_of, store_of, tensors
from tests.cache.policies import Recent, ValueNorm


def filled(store, length, **options):
    for layer in range(store.spec.num_budgeted_layers):
        store.prefill(layer, *tensors(length, store.batch_size), **options)
    return store


def test_what_was_kept():
    store = filled(
        store_of(ValueNorm(3, 2), [[10, 20], [30, 40]], batch_size=2, decode="append"), 50, num_padding=[0, 25]
    )
    report = store.report()
    assert (report.policy, report.params) == ("ValueNorm", {"num_sink_tokens": 3, "recent_window": 2})
    assert (report.decode, report.seen, report.evicted) == ("append", (50, 25), True)
    assert report.entries == (100, 10 + 20 + 25 + 25) and report.full == (200, 100)
    assert report.retention == 180 / 300
    assert (report.asked, report.allowed, report.protected) == ((100, 100), (100, 100), (0, 0))
    assert (report.nbytes, report.dense_nbytes) == (store.nbytes, 300 * 14 * 4)
    assert str(report).splitlines() == [
        "policy: ValueNorm(num_sink_tokens=3, recent_window=2), decode='append'",
        "tokens seen: 50, 25",
        "kept: 180 of 300 entries (60.00%)",
        f"memory: {store.nbytes / 1e6:.2f} MB, a full cache 0.02 MB",
    ]


def test_it_says_when_nothing_was_evicted():
    store = filled(store_of(Recent(), [20, 30]), 20)
    assert not store.report().evicted and "nothing was evicted: every token seen is kept" in str(store.report())
    store.decode(0, *tensors(1))
    assert store.report().evicted and "nothing" not in str(store.report())


def test_every_way_of_losing_an_entry_is_noticed():
    assert Play(ValueNorm(), [5, 30]).prompt(6).store.report().evicted
    assert Play(Recent(), [5, 30]).prompt(5).decode(1).store.report().evicted
    assert Play(ValueNorm(), [5, 30]).prompt(5).decode(1).store.report().evicted
    assert Play(ValueNorm(), [5, 30]).prompt(6, hold=0).store.report().evicted
    assert not Play(ValueNorm(), [5, 30]).prompt(6, hold=1).store.report().evicted
    assert Play(ValueNorm(), [5, 30], batch=2).prompt(6, 2).take(0).store.report().evicted
    assert not Play(ValueNorm(), [5, 30], batch=2).prompt(6, 2).take(1).store.report().evicted
    assert not Play(ValueNorm(), [5, 30], decode="append").prompt(5).decode(4).store.report().evicted


def test_protected_spans_are_counted_apart():
    report = filled(store_of(Recent(), [[10, 20]] * 2, protected=[(0, 4), (30, 36)]), 50).report()
    assert report.protected == (2 * 2 * (2 + 6),), "two of the first span's tokens are sink tokens"
    assert report.entries == (60 + 32,) and report.allowed == (60,)
    assert "protected spans: 32 entries, on top of the budget" in str(report)


def test_it_says_when_the_floors_exceed_the_budget():
    growing = Growing((1, 2), lambda kept, context: torch.ones(1, 2), Ask(0.1, min_tokens=4), 1)
    report = filled(RaggedStore(spec_of(), growing, Recent(6)), 30).report()
    assert report.floors_exceed and (report.asked, report.allowed) == ((8,), (14,))
    assert "exceed the budget: 8 entries were asked for, 14 are allowed" in str(report)
    report = filled(RaggedStore(spec_of(), Fixed(torch.tensor([[7, 7]]), asked=9), Recent(6)), 30).report()
    assert report.floors_exceed and report.asked == (9,)
    assert not filled(store_of(Recent(), [10, 20]), 50).report().floors_exceed


def test_an_empty_store_and_one_without_limits():
    report = store_of(Recent(), [10, 20]).report()
    assert (report.seen, report.entries, report.retention, report.asked) == ((0,), (0,), 1.0, ())
    report = filled(store_of(Recent(), [UNLIMITED, UNLIMITED]), 20).report()
    assert (report.asked, report.allowed, report.entries) == ((), (), (40,))
    assert "nothing was evicted" in str(report)


def test_pending_tokens_count_as_held():
    assert Play(Recent(), [5, 7]).prompt(12, hold=3).store.report().entries == (5 + 7 + 6,)


def test_a_report_is_of_its_moment():
    store = filled(store_of(Recent(), [10, 20]), 20)
    before = store.report()
    kept = dataclasses.asdict(before)
    store.decode(0, *tensors(1))
    assert dataclasses.asdict(before) == kept != dataclasses.asdict(store.report())
