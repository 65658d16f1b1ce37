"""How long the first token took to come, and how much memory."""

import copy
import sys

import pytest
import torch

from kvpolicy.cache import first_token, peak_memory
from kvpolicy.cache.first_token import FirstToken
from kvpolicy.cache.peak_memory import PeakMemory
from tests.cache.play import Play, store_of, tensors
from tests.cache.policies import Recent

CPU, MB = torch.device("cpu"), 1 << 20


@pytest.fixture
def clock(monkeypatch):
    """What the time is; tests move it."""
    now = [0.0]
    monkeypatch.setattr(first_token.time, "perf_counter", lambda: now[0])
    return now


def feed(store, length, clock, seconds):
    for layer in range(store.spec.num_budgeted_layers):
        store.prefill(layer, *tensors(length)) if length > 1 else store.decode(layer, *tensors(1))
        clock[0] += seconds


def test_from_the_first_keys_of_a_prompt_in_pieces_until_the_first_token(clock):
    store = store_of(Recent(), [[5, 30]] * 2)
    feed(store, 6, clock, 1.0)
    feed(store, 4, clock, 0.5)
    assert store.report().first_token_seconds is None and "first token" not in str(store.report())
    for _ in range(3):  # the first one counts
        feed(store, 1, clock, 0.25)
    feed(store, 5, clock, 1.0)
    assert store.report().first_token_seconds == 2 * 1.0 + 2 * 0.5
    assert "first token: 3.000 s" in str(store.report())


def test_a_copy_has_what_was_there_and_goes_its_own_way(clock):
    store = store_of(Recent(), [[5, 30]] * 2)
    feed(store, 6, clock, 1.0)
    fork, other = store.fork(), copy.deepcopy(store)
    for each in (store, fork, other):
        feed(each, 1, clock, 1.0)
    assert [x.report().first_token_seconds for x in (store, fork, other)] == [2.0, 4.0, 6.0]


def test_nothing_is_told_of_an_empty_store():
    report = store_of(Recent(), [5, 30]).report()
    assert (report.first_token_seconds, report.peak_nbytes) == (None, None)


def test_the_peak_is_said_where_it_is_known(monkeypatch):
    monkeypatch.setattr(first_token, "PeakMemory", lambda device: type("Peak", (), {"measure": lambda _: 3_000_000})())
    report = Play(Recent(), [5, 30]).prompt(6).decode(2).store.report()
    assert report.peak_nbytes == 3_000_000 and "s, and 3.00 MB at the most" in str(report)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory a process had at the most")
def test_memory_that_is_free_again_is_in_the_peak():
    peak = PeakMemory(CPU, fresh=True)
    taken = torch.ones(64 * MB // 4)
    assert taken.sum() > 0
    del taken
    assert 60 * MB < peak.measure() < 100 * MB
    other = PeakMemory(CPU)  # below what was in use once
    assert other.measure() is None
    assert torch.ones(128 * MB // 4).sum() > 0
    assert 120 * MB < other.measure() < 164 * MB


def test_nothing_is_known_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_OF_PROCESS", tmp_path)
    assert PeakMemory(CPU, fresh=True).measure() is None
    seen = FirstToken()
    seen.begin(CPU)
    seen.come()
    assert seen.seconds >= 0 and seen.peak_nbytes is None
