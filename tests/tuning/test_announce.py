"""What is said of a search before it starts."""

import pytest

from kvpolicy.tuning import trial_count, tune
from tests.tiny import tiny_model
from tests.tuning.searches import Notes, make_corpus, make_settings

FITS = "the number of trials fits this machine; give trials= for the same search elsewhere"


@pytest.mark.parametrize(
    ("allocator", "trials", "fits"), [("baklava", None, True), ("baklava", 2, False), ("uniform", None, False)]
)
def test_only_a_number_of_trials_that_was_chosen_by_time_is_said_to_fit(tmp_path, monkeypatch, allocator, trials, fits):
    monkeypatch.setattr(trial_count, "SEARCH_SECONDS", 0.0)
    monkeypatch.setattr(trial_count, "LEAST_TRIALS", 2)
    notes = Notes()
    settings = make_settings(tmp_path, allocator=allocator, trials=trials)
    tune(tiny_model("Llama", layers=2), make_corpus(), settings, progress=notes)
    assert (FITS in notes.said) == fits
