"""What stands in a study that a search wrote, by the names that studies on disk have."""

import optuna
import pytest
import torch

from kvpolicy.tuning.costs import Cost
from kvpolicy.tuning.study_notes import StudyNotes, TrialNotes

SETTINGS = {"seed": 0, "dtype": "torch.float32"}
HASH = "af9da7c7eb2acb0f"  # of the settings above
TABLE = torch.tensor([[1, 2], [3, 4]])
TABLE_HASH, TABLES_HASH = "1e258794ed040eaa", "e461f0e754fe7c2e"  # of the table, and of a list that it is alone in


@pytest.fixture
def study():
    return optuna.create_study()


@pytest.fixture
def notes(study):
    notes = StudyNotes(study)
    notes.keep_settings(SETTINGS)
    return notes


def test_an_empty_study_holds_nothing(study):
    notes = StudyNotes(study)
    assert not notes.are_ours and notes.settings == {}
    assert [notes.trials, notes.fitted_shares, notes.fit_state, notes.uniform_loss] == [None] * 4
    assert notes.losses("search", [TABLE]) is None and notes.passkey_score(TABLE) is None
    assert notes.cost("shared") == Cost()


def test_what_a_study_on_disk_holds_is_read(study):
    attributes = {
        "settings": SETTINGS,
        "trials": 9,
        "fitted": [[0.5, 0.25]],
        f"fit_state:{HASH}": {"step": 3},
        f"uniform:{HASH}": 2.5,
        f"losses:{HASH}:search:{TABLES_HASH}": [[1.0, 2.0], None],
        f"losses:{HASH}:heldout:{TABLES_HASH}": [[3.0], [4.0]],
        f"passkey:{HASH}:{TABLE_HASH}": 0.95,
        f"cost:search:{HASH}:0": {"tokens": 10, "forwards": 1, "seconds": 0.5},
        f"cost:search:{HASH}:1": {"tokens": 20, "forwards": 2, "seconds": 1.0},
    }
    for name, value in attributes.items():
        study.set_user_attr(f"kvpolicy_{name}", value)
    notes = StudyNotes(study)
    assert notes.are_ours and notes.settings == SETTINGS
    assert (notes.trials, notes.fit_state, notes.uniform_loss) == (9, {"step": 3}, 2.5)
    assert notes.fitted_shares.tolist() == [[0.5, 0.25]] and notes.fitted_shares.dtype == torch.float64
    text, answers = notes.losses("search", [TABLE])
    assert text.tolist() == [1, 2] and answers is None
    assert [losses.tolist() for losses in notes.losses("heldout", [TABLE])] == [[3], [4]]
    assert notes.passkey_score(TABLE) == 0.95
    assert notes.cost("search") == Cost(30, 3, 1.5) and notes.cost("shared") == Cost()


def test_what_is_kept_has_the_names_of_studies_on_disk(study, notes):
    notes.keep_trials(9)
    notes.keep_fitted_shares(torch.ones(1, 2))
    notes.keep_fit_state(1)
    notes.keep_uniform_loss(2.5)
    notes.keep_losses("search", [TABLE], torch.ones(2), None)
    notes.keep_passkey_score(TABLE, 0.95)
    notes.keep_cost("shared", Cost(1, 2, 3))
    names = {name.removeprefix("kvpolicy_") for name in study.user_attrs}
    (cost,) = (name for name in names if name.startswith("cost:"))
    assert names - {cost} == {
        "settings",
        "trials",
        "fitted",
        f"fit_state:{HASH}",
        f"uniform:{HASH}",
        f"losses:{HASH}:search:{TABLES_HASH}",
        f"passkey:{HASH}:{TABLE_HASH}",
    }
    assert cost.startswith(f"cost:shared:{HASH}:")


def test_what_was_measured_under_other_settings_is_not_there(notes):
    notes.keep_uniform_loss(2.5)
    notes.keep_fit_state(1)
    notes.keep_settings(SETTINGS | {"dtype": "torch.bfloat16"})
    assert notes.uniform_loss is None and notes.fit_state is None
    notes.keep_settings(SETTINGS)
    assert notes.uniform_loss == 2.5 and notes.fit_state == 1


def test_notes_on_a_trial(study):
    plain = TrialNotes(study.ask())
    assert (plain.owner, plain.point, plain.is_surplus, plain.is_stopped) == (None, None, False, False)
    attributes = TrialNotes.claim({"pid": 7}, 3)
    assert attributes == {"kvpolicy_owner": {"pid": 7}, "kvpolicy_point": 3}
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes | {"kvpolicy_stopped": True}))
    ended = TrialNotes(study.trials[-1])
    assert (ended.owner, ended.point, ended.is_stopped) == ({"pid": 7}, 3, True)
    plain.keep_surplus()
    assert TrialNotes(study.trials[0]).is_surplus
