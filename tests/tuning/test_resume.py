"""A search that was interrupted goes on, and one that has ended stays as it is."""

from dataclasses import replace

import optuna
import pytest
import torch

from kvpolicy import StudyError, TransformersProbe
from kvpolicy.plugins.registry import registry
from kvpolicy.tuning import search, tune
from kvpolicy.tuning.storage import open_storage
from tests.tiny import tiny_model
from tests.tuning.searches import (
    Notes,
    OneHead,
    WiderSpace,
    interrupt,
    make_corpus,
    make_settings,
    points,
    run,
    states,
    the_study,
)


def test_resume_for_another_policy_is_refused_by_name(tmp_path):
    settings = make_settings(tmp_path, policy="snapkv", context_length=96, trials=1)
    run(settings)
    with pytest.raises(StudyError, match=r'\(policy was \{"name": "snapkv".*, now \{"name": "h2o".*\)'):
        run(replace(settings, policy="h2o", resume=True))
    with pytest.raises(StudyError, match=r"\(prefill_length was null, now 40\)"):
        run(replace(settings, prefill_length=40, resume=True))


@pytest.mark.parametrize("number", [1, 2, 4])
def test_resume_after_an_interruption_loses_at_most_the_running_trial(tmp_path, monkeypatch, number):
    settings = make_settings(tmp_path, trials=5)
    interrupt(monkeypatch, settings, number)
    study = the_study(settings)
    assert states(study).count("COMPLETE") == number - 1
    assert states(study).count("FAIL") == 1
    lost = study.trials[number - 1].params
    run(replace(settings, resume=True))
    study = the_study(settings)
    assert states(study).count("COMPLETE") == 5
    assert states(study).count("FAIL") == 1
    assert "RUNNING" not in states(study) and "WAITING" not in states(study)
    assert lost in points(study), "the interrupted point is run again"


def test_an_interruption_before_the_point_is_drawn_keeps_the_queued_point(tmp_path, monkeypatch):
    settings = make_settings(tmp_path, allocator="baklava")
    with monkeypatch.context() as patch:
        patch.setattr(registry.get("allocator", "baklava"), "suggest", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    run(replace(settings, resume=True))
    defaults = registry.create("allocator", "baklava").params()
    first = points(the_study(settings))[0]
    assert first == {name: defaults[name] for name in first}


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_an_interruption_after_a_trial_was_told_leaves_it_finished(tmp_path, monkeypatch):
    settings = make_settings(tmp_path)
    plain = search._run

    def told_then_interrupted(study, trial, *more):
        plain(study, trial, *more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "_run", told_then_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert states(the_study(settings)) == ["COMPLETE"]


def test_an_existing_study_blocks_no_new_search_and_stays_as_it_is(tmp_path, offered):
    settings = make_settings(tmp_path, allocator=offered(OneHead))
    run(settings)
    first, before = the_study(settings), settings.journal.read_bytes()
    for changes, count in (({}, 2), ({"seed": 1}, 3)):
        notes = Notes()
        tune(tiny_model("Llama", layers=2), make_corpus(), replace(settings, trials=count, **changes), progress=notes)
        again = the_study(settings)
        assert again.study_name != first.study_name and states(again) == ["COMPLETE"] * count
        assert [x for x in notes.said if "a new search is begun; an earlier one is kept in" in x]
    assert settings.journal.read_bytes()[: len(before)] == before
    run(replace(settings, resume=True, trials=4))  # that of seed 0, and of its two the newer
    kept = {x.study_name: x.n_trials for x in optuna.get_all_study_summaries(open_storage(settings.storage))}
    assert kept == {first.study_name: 3, f"{first.study_name}-2": 4, again.study_name: 3}


def test_a_search_beside_another_is_resumed_before_all_its_levels_have_trials(tmp_path, monkeypatch, offered):
    settings = make_settings(tmp_path, allocator=offered(OneHead), retentions=(0.4, 0.2), trials=2)
    run(settings)
    beside = replace(settings, seed=1)
    interrupt(monkeypatch, beside, 2)
    run(replace(beside, resume=True))
    assert [states(the_study(beside, retention)).count("COMPLETE") for retention in beside.retentions] == [2, 2]
    assert the_study(beside, 0.4).user_attrs["kvpolicy_settings"]["seed"] == 1


def test_a_finished_search_that_is_resumed_measures_nothing_again(tmp_path, monkeypatch, offered):
    settings = make_settings(tmp_path, allocator=offered(OneHead), retentions=(0.4, 0.2))
    plan = run(settings)
    for name in ("loss", "token_losses"):
        monkeypatch.setattr(TransformersProbe, name, lambda *_: pytest.fail("measured"))
    again = run(replace(settings, resume=True))
    assert [x.perplexity for x in again.levels] == [x.perplexity for x in plan.levels]
    assert [x.comparison for x in again.levels] == [x.comparison for x in plan.levels]


def test_resume_without_a_study_starts_one(tmp_path):
    settings = make_settings(tmp_path, resume=True)
    run(settings)
    assert states(the_study(settings)) == ["COMPLETE"] * 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"context_length": 80}, "context_length was 64, now 80"),
        ({"allocator": "uniform"}, 'allocator was "onehead", now "uniform"'),
        ({"estimator": "uniform"}, 'estimator was {"name": "cosine".*now {"name": "uniform"'),
        ({"sampler": "gp"}, 'sampler was "tpe", now "gp"'),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_resume_with_another_setting_is_refused_by_name(tmp_path, offered, change, named):
    settings = make_settings(tmp_path, allocator=offered(OneHead), trials=1)
    run(settings)
    with pytest.raises(StudyError, match=named) as raised:
        run(replace(settings, resume=True, **change))
    assert ("seed was" in str(raised.value)) == ("seed" in change), "only what differs is named"


def test_resume_with_another_text_model_or_space_is_refused_by_name(tmp_path, offered):
    settings = make_settings(tmp_path, allocator=offered(OneHead), trials=1)
    run(settings)
    again = replace(settings, resume=True)
    with pytest.raises(StudyError, match=r"\(text was \"0.*, now \"1[^,]*\)"):
        run(again, corpus=make_corpus(1))
    with pytest.raises(StudyError, match=r"\(model was.*weights was"):
        run(again, model=tiny_model("Llama", layers=2, rms_norm_eps=1e-3, intermediate_size=32, vocab_size=98))
    tuned_further = tiny_model("Llama", layers=2)
    tuned_further.model.layers[1].mlp.down_proj.weight.data.mul_(1.1)
    with pytest.raises(StudyError, match=r"\(weights was"):
        run(again, model=tuned_further)
    offered(WiderSpace, "onehead")
    with pytest.raises(StudyError, match=r"\(space was .*low=40.*"):
        run(again)


def test_resume_goes_on_in_the_dtype_of_the_study(tmp_path, monkeypatch):
    settings = make_settings(tmp_path, trials=1)
    run(settings, tiny_model("Llama", layers=2).to(torch.bfloat16))
    model = tiny_model("Llama", layers=2)
    plan = run(replace(settings, resume=True, choose_dtype=True, trials=2), model)
    assert plan.provenance["dtype"] == "bfloat16"
    assert model.dtype == torch.float32, "the caller's model is as it came"
    assert states(the_study(settings)) == ["COMPLETE"] * 2
