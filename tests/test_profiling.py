"""Profiling: progress, and losses that survive an interruption."""

import json

import pytest
import torch
from kvpolicy_baklava.estimator import CosineEstimator
from kvpolicy_baselines.sensitivity import SensitivityEstimator

from kvpolicy import ModelProbe, PluginError, StudyError
from kvpolicy.integrations.transformers import TransformersProbe
from kvpolicy.measure.delegate import DelegateProbe
from kvpolicy.measure.profiling import ProfilingProbe, profile
from kvpolicy.progress import Progress
from kvpolicy.testing import SyntheticProbe
from kvpolicy.tuning.loss_journal import LossJournal
from tests.tuning.searches import make_settings, run

TABLE = torch.tensor([[5, 64], [8, 64]])
LOSSES = torch.tensor([1 / 3, 2 / 7, 1e-17], dtype=torch.float64)
SETTINGS = {"text": "abc", "dtype": "float32"}


class Steps(Progress):
    def __init__(self):
        self.begun, self.steps, self.ended = [], [], 0

    def begin(self, stage, total):
        self.begun.append((stage, total))

    def advance(self, detail=""):
        self.steps.append(detail)

    def end(self):
        self.ended += 1


# --- the probe


def test_every_question_goes_to_the_probe_behind():
    public = {name for name in vars(ModelProbe) if not name.startswith("_")}
    assert public <= set(vars(DelegateProbe))
    probe = SyntheticProbe()
    seen = ProfilingProbe(probe, 1, Progress())
    assert (seen.spec, seen.context_length, seen.least_capacity) == (probe.spec, 64, 5)
    assert all(map(torch.equal, seen.prompts, probe.prompts))
    assert torch.equal(seen.tokenize("one two"), probe.tokenize("one two"))


@pytest.mark.parametrize("estimator", [CosineEstimator(), SensitivityEstimator()])
def test_the_result_is_the_estimators_and_every_forward_a_step(estimator):
    probe, steps = SyntheticProbe(), Steps()
    forwards = estimator.num_forwards(probe.spec, prompts=2, sequences=2)
    found = profile(estimator, probe, forwards, steps)
    assert torch.equal(found.per_head, estimator.estimate(SyntheticProbe()).per_head)
    assert steps.begun == [("profile", forwards)] and steps.ended == 1
    assert len(steps.steps) == probe.forwards == forwards


def test_long_profiles_say_each_tenth():
    steps = Steps()
    profile(SensitivityEstimator(sizes=(0.1, 0.125, 0.25, 0.5)), SyntheticProbe(), 50, steps)
    said = [step for step in steps.steps if step]
    assert said == [f"{count} of 50 forwards" for count in range(5, 55, 5)]


def test_the_stage_ends_when_the_estimator_fails():
    class Failing(SyntheticProbe):
        def loss(self, capacities):
            raise ZeroDivisionError

    steps = Steps()
    with pytest.raises(PluginError, match=r"^estimator 'sensitivity' of kvpolicy .* raised ZeroDivisionError"):
        profile(SensitivityEstimator(), Failing(), 1, steps)
    assert steps.ended == 1


# --- the file


def test_losses_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "plan.json.losses"
    journal = LossJournal(path, SETTINGS, resume=False)
    assert journal.find(TABLE) is None and not path.exists()
    journal.keep(TABLE, LOSSES)
    again = LossJournal(path, SETTINGS, resume=True)
    for known in (journal, again):
        assert torch.equal(known.find(TABLE.clone()), LOSSES)
        assert known.find(TABLE.mT) is None, "another table"
    again.keep(TABLE + 1, LOSSES * 2)
    third = LossJournal(path, SETTINGS, resume=True)
    assert torch.equal(third.find(TABLE + 1), LOSSES * 2) and torch.equal(third.find(TABLE), LOSSES)


@pytest.mark.parametrize(("settings", "resume"), [(SETTINGS, False), ({**SETTINGS, "dtype": "bfloat16"}, True)])
def test_losses_of_other_settings_or_without_resume_are_not_used(tmp_path, settings, resume):
    path = tmp_path / "plan.json.losses"
    LossJournal(path, SETTINGS, resume=False).keep(TABLE, LOSSES)
    journal = LossJournal(path, settings, resume=resume)
    assert journal.find(TABLE) is None
    journal.keep(TABLE + 1, LOSSES)
    assert torch.equal(LossJournal(path, settings, resume=True).find(TABLE + 1), LOSSES)
    assert torch.equal(LossJournal(path, SETTINGS, resume=True).find(TABLE), LOSSES), "what was there is kept"


def test_a_torn_last_line_is_cut(tmp_path):
    path = tmp_path / "plan.json.losses"
    journal = LossJournal(path, SETTINGS, resume=False)
    journal.keep(TABLE, LOSSES)
    journal.keep(TABLE + 1, LOSSES)
    path.write_text(path.read_text()[:-9])
    found = LossJournal(path, SETTINGS, resume=True)
    assert torch.equal(found.find(TABLE), LOSSES) and found.find(TABLE + 1) is None


@pytest.mark.parametrize("content", ["", '{"text": "ab', "{}\n[1]\n"])
def test_a_file_without_whole_settings_of_ours_is_gone_on_with(tmp_path, content):
    path = tmp_path / "plan.json.losses"
    path.write_text(content)
    LossJournal(path, SETTINGS, resume=True).keep(TABLE, LOSSES)
    assert torch.equal(LossJournal(path, SETTINGS, resume=True).find(TABLE), LOSSES)


@pytest.mark.parametrize("content", ["no json\n", json.dumps(SETTINGS) + "\nno json\n"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "plan.json.losses"
    path.write_text(content)
    with pytest.raises(StudyError, match="move the file away"):
        LossJournal(path, SETTINGS, resume=True)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(StudyError, match="cannot write the losses of profiling to"):
        LossJournal(tmp_path / "missing" / "x.losses", SETTINGS, resume=False).keep(TABLE, LOSSES)


# --- a search


def counted(monkeypatch, stop_at=None):
    """The tables asked for while profiling; Ctrl-C in front of number `stop_at`."""
    asked, plain = [], TransformersProbe.loss

    def loss(self, capacities):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append(capacities)
        return plain(self, capacities)

    monkeypatch.setattr(TransformersProbe, "loss", loss)
    return asked


def test_an_interrupted_profile_goes_on_and_gives_the_same_plan(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("whole", "cut")]
    for folder in folders:
        folder.mkdir()
    methods = {"estimator": "sensitivity", "allocator": "power"}
    whole, cut = (make_settings(folder, **methods) for folder in folders)
    expected = run(whole)
    with monkeypatch.context() as patch:
        before = counted(patch, stop_at=7)
        with pytest.raises(KeyboardInterrupt):
            run(cut)
    assert len(before) == 7
    with monkeypatch.context() as patch:
        after = counted(patch)
        found = run(make_settings(folders[1], **methods, resume=True))
    # 13 tables of the estimator in all, then full, uniform and the plan's on the held-out text
    assert len(after) in (13 - 7 + 2, 13 - 7 + 3)
    assert torch.equal(found.importance.per_head, expected.importance.per_head)
    assert torch.equal(found.capacities(64, retention=0.4), expected.capacities(64, retention=0.4))
    assert found.levels[0].perplexity == expected.levels[0].perplexity
