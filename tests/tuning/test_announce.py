"""What is said of a search before it starts."""

import pytest

from kvpolicy.progress import Progress
from kvpolicy.tuning import trial_count, tune
from tests.test_tune import make_corpus, make_settings
from tests.tiny import tiny_model

FITS = "the number of trials fits this machine; give trials= for the same search elsewhere"


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


@pytest.mark.parametrize(
    ("allocator", "trials", "fits"), [("baklava", None, True), ("baklava", 2, False), ("uniform", None, False)]
)
def test_only_a_number_of_trials_that_was_chosen_by_time_is_said_to_fit(tmp_path, monkeypatch, allocator, trials, fits):
    monkeypatch.setattr(trial_count, "SEARCH_SECONDS", 0.0)
    monkeypatch.setattr(trial_count, "LEAST_TRIALS", 2)
    notes = Notes()
    settings = make_settings(tmp_path, allocator=allocator, trials=trials)
    tune(tiny_model("Llama", layers=2), make_corpus(), settings, progress=notes)
    assert (FITS in notes.lines) == fits
