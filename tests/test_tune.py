"""The search: the same for the same seed, exact, honest about uniform, and safe against interruption."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import psutil
import pytest
import torch
from optuna.trial import TrialState

from kvpolicy import (
    Budget,
    BudgetAllocator,
    BudgetError,
    Importance,
    ImportanceEstimator,
    ModelError,
    PluginError,
    PromptProbe,
    StudyError,
    TextError,
    TransformersProbe,
    load_plan,
    save_plan,
)
from kvpolicy.measure.evaluation import perplexity
from kvpolicy.plugins.registry import registry
from kvpolicy.progress import Progress
from kvpolicy.report.tables import warnings_of
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning import TuneSettings, search, search_method, storage, trial_count, trials, tune
from kvpolicy.tuning.storage import open_storage, repair_journal
from kvpolicy.tuning.studies import open_study
from tests.tiny import tiny_model

CONTEXT = 64
ROOT = Path(__file__).parent.parent


def make_corpus(seed=0, name="drawn"):
    """Token ids in which each one depends on one some 20 positions before, so that long windows pay."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (2000,), generator=generator)
    for i in range(20, 2000):
        if i % 3:
            ids[i] = ids[i - 20]
    return Corpus(name, str(seed) * 64, ids[:1200], ids[1200:])


def make_settings(tmp_path, **changes):
    given = {"retentions": (0.4,), "context_length": CONTEXT, "trials": 3, "choose_dtype": False}
    places = {"out": tmp_path / "plan.json", "storage": tmp_path / "plan.json.study"}
    return TuneSettings(**{**given, **places, **changes})


def run(settings, model=None, corpus=None):
    return tune(model or tiny_model("Llama", layers=2), corpus or make_corpus(), settings)


def the_study(settings, retention=0.4):
    """The newest one of a level, also without trials."""
    kept = open_storage(settings.storage)
    begins = settings.study_name(retention) + "-"
    names = [study.study_name for study in kept.get_all_studies() if study.study_name.startswith(begins)]
    return optuna.load_study(study_name=names[-1], storage=kept)


def states(study):
    return [trial.state.name for trial in study.trials]


def points(study):
    return [trial.params for trial in study.trials if trial.state == TrialState.COMPLETE]


@dataclass(frozen=True, slots=True)
class OneHead(BudgetAllocator):
    """Nearly everything to one KV head, the more the larger `skew`; 0 is uniform."""

    skew: float = 50.0

    def shares(self, importance: Importance, budget: Budget) -> torch.Tensor:
        shares = torch.ones(budget.shape)
        shares[0, 0] += self.skew
        return shares

    @classmethod
    def suggest(cls, trial):
        return cls(skew=trial.suggest_float("skew", 40.0, 60.0))


@dataclass(frozen=True, slots=True)
class WiderSpace(OneHead):
    @classmethod
    def suggest(cls, trial):
        return cls(skew=trial.suggest_float("skew", 30.0, 60.0))


@dataclass(frozen=True, slots=True)
class Fixed(BudgetAllocator):
    """Nothing to search; the second layer gets three times the first one's."""

    def shares(self, importance: Importance, budget: Budget) -> torch.Tensor:
        shares = torch.ones(budget.shape)
        shares[-1] *= 3
        return shares


@dataclass(frozen=True, slots=True)
class Learned(Fixed):
    def fit(self, probe, importance, budget):
        shares = torch.ones(budget.shape)
        shares[0] *= 2 + budget.total
        return shares


@dataclass(frozen=True, slots=True)
class BrokenAllocator(BudgetAllocator):
    def shares(self, importance: Importance, budget: Budget) -> torch.Tensor:
        raise ZeroDivisionError("no head matters")


@dataclass(frozen=True, slots=True)
class BrokenEstimator(ImportanceEstimator):
    def estimate(self, probe):
        raise RuntimeError("no power")


@pytest.fixture
def offered(monkeypatch):
    """offered(cls): the name under which the search finds a class of ours."""
    doubles = {}

    class Doubled:
        def get(self, role, name):
            return doubles.get(name) or registry.get(role, name)

        def create(self, role, name, params=None):
            return doubles[name](**(params or {})) if name in doubles else registry.create(role, name, params)

    def offer(cls, name=None):
        name = name or cls.__name__.lower()
        doubles[name] = cls
        return name

    monkeypatch.setattr(search_method, "registry", Doubled())
    return offer


class StopAt:
    """Raises KeyboardInterrupt from inside the evaluation of the n-th trial, in its first sequence."""

    def __init__(self, monkeypatch, number):
        self.number, self.calls = number, 0
        self.plain = search.chunk_parts
        monkeypatch.setattr(search, "chunk_parts", self)

    def __call__(self, losses):
        self.calls += 1
        for index, parts in enumerate(self.plain(losses)):
            if self.calls == self.number and index == 0:
                raise KeyboardInterrupt
            yield parts


def interrupt(monkeypatch, settings, number, **more):
    """A search that is interrupted in its n-th trial."""
    with monkeypatch.context() as patch:
        StopAt(patch, number)
        with pytest.raises(KeyboardInterrupt):
            run(settings, **more)


def without_times(path):
    document = json.loads(path.read_text())
    del document["provenance"]["created"]
    for cost in document["provenance"]["calibration"]:
        del cost["seconds"]
    return json.dumps(document)


# --- what a search gives


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_the_same_seed_gives_the_same_plan(tmp_path, sampler):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        settings = make_settings(tmp_path / name, trials=6, seed=3, sampler=sampler)
        save_plan(run(settings), settings.out)
        written.append(without_times(settings.out))
    assert written[0] == written[1]
    assert load_plan(tmp_path / "a" / "plan.json").provenance["sampler"] == sampler


def test_another_seed_draws_other_points(tmp_path):
    drawn = []
    for seed in (0, 1):
        settings = make_settings(tmp_path, seed=seed, out=tmp_path / f"{seed}.json")
        run(settings)
        drawn.append(points(the_study(settings)))
    assert drawn[0][0] == drawn[1][0], "the first trial is the allocator's defaults"
    assert drawn[0][1:] != drawn[1][1:]


def test_a_search_prints_no_warning(tmp_path, capfd):
    run(make_settings(tmp_path))  # pytest turns a warning into an error; Optuna's log goes to stderr
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("retention", [0.05, 0.3, 0.77])
def test_the_capacities_of_a_plan_sum_exactly(tmp_path, retention):
    plan = run(make_settings(tmp_path, retentions=(retention,), trials=2))
    for context in (CONTEXT, 100, 129, 250):
        floors = 4 * (4 + 1)
        assert int(plan.capacities(context, retention).sum()) == max(round(retention * context * 4), floors)


def test_levels_are_searched_from_the_largest_and_recorded(tmp_path):
    settings = make_settings(tmp_path, retentions=(0.2, 0.6), trials=2)
    plan = run(settings)
    assert [level.retention for level in plan.levels] == [0.6, 0.2]
    assert plan.provenance | {"created": ""} == {
        **plan.provenance,
        "created": "",
        "seed": 0,
        "trials": 2,
        "context_length": CONTEXT,
        "text": "drawn",
        "text_sha256": "0" * 64,
        "sampler": "tpe",
        "dtype": "float32",
    }
    for found in plan.levels:
        assert set(found.perplexity) == {"search", "heldout", "heldout_full", "heldout_uniform"}
        assert len(the_study(settings, found.retention).trials) == 2


def test_the_search_figure_of_a_level_is_that_of_its_capacities(tmp_path):
    model, corpus = tiny_model("Llama", layers=2), make_corpus()
    plan = run(make_settings(tmp_path), model, corpus)
    table = plan.capacities(CONTEXT, retention=0.4)
    for part, count in (("search", 4), ("heldout", 8)):
        probe = TransformersProbe(model, corpus.sequences(part, count, CONTEXT))
        found = perplexity(probe.loss(table))
        assert plan.levels[0].perplexity[part] == pytest.approx(found, rel=1e-6)


def test_uniform_is_stored_and_said_where_no_trial_beats_it(tmp_path, monkeypatch, offered):
    model = tiny_model("Llama", layers=2)
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_spread)
    plan = run(make_settings(tmp_path, allocator=offered(OneHead)), model)
    level = plan.levels[0]
    assert torch.equal(level.shares, torch.full((2, 2), 0.4, dtype=torch.float64))
    assert level.allocator_params == {}
    assert level.comparison["verdict"] == "uniform kept: no trial beat it"
    assert level.perplexity["heldout"] == level.perplexity["heldout_uniform"]


def losses_by_spread(self, capacities):
    """The more uneven a table, the worse; each sequence and token has a noise of its own that is always the same."""
    spread = float((capacities.double() / capacities.double().mean() - 1).abs().mean())
    for index in range(len(self.sequences)):
        noise = torch.rand(1, CONTEXT - CONTEXT // 4, generator=torch.Generator().manual_seed(index))
        yield (3 + spread + 0.01 * noise).float()


@pytest.mark.parametrize("double", [Fixed, Learned])
def test_an_allocator_without_parameters_is_reported_with_its_own_figures(tmp_path, monkeypatch, offered, double):
    def prefer_uneven(self, capacities):
        for losses in losses_by_spread(self, capacities):
            yield 6 - losses

    monkeypatch.setattr(TransformersProbe, "token_losses", prefer_uneven)
    settings = make_settings(tmp_path, allocator=offered(double))
    level = run(replace(settings, trials=1)).levels[0]
    assert level.comparison["verdict"] == "better than uniform"
    assert level.perplexity["heldout"] < level.perplexity["heldout_uniform"]
    uneven = level.shares.mean(1)
    assert (uneven[0] > uneven[1]) if double is Learned else (uneven[0] < uneven[1])


@pytest.mark.parametrize("double", [OneHead, Learned])
def test_a_level_that_heldout_text_finds_worse_than_uniform_is_vetoed(tmp_path, monkeypatch, offered, double):
    settings = make_settings(tmp_path, allocator=offered(double), sequences=3)

    def uneven_in_the_search_alone(self, capacities):
        for losses in losses_by_spread(self, capacities):
            yield 6 - losses if len(self.sequences) == settings.sequences else losses

    monkeypatch.setattr(TransformersProbe, "token_losses", uneven_in_the_search_alone)
    lines: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, message: lines.append(message))
    plan = run(settings)
    (level,) = plan.levels
    assert torch.equal(level.shares, torch.full((2, 2), 0.4, dtype=torch.float64))
    assert level.allocator_params == {}
    assert level.perplexity["heldout"] == level.perplexity["heldout_uniform"]
    assert level.comparison["verdict"] == "uniform kept: the held-out text vetoed the search"
    assert level.comparison["loss_minus_uniform"] == 0 and level.comparison["interval"] == [0, 0]
    assert level.comparison["veto"]["loss_minus_uniform"] > 0
    assert level.comparison["veto"]["interval"][0] > 0
    assert any("worse than uniform" in line and "so the plan stores uniform" in line for line in lines)
    told = [line for line in warnings_of(plan) if "worse than uniform on held-out text" in line]
    assert len(told) == 1 and told[0].startswith("warning: at 40 % kept")
    table = plan.capacities(CONTEXT, retention=0.4).double()
    spread = float((table / table.mean() - 1).abs().mean())
    assert level.perplexity["search"] == pytest.approx(math.exp(3 - spread), rel=0.01), "uniform's own, as it is stored"


@dataclass(frozen=True, slots=True)
class Counted(Fixed):
    """Counts how often it learns."""

    times: int = 1

    def fit(self, probe, importance, budget):
        FITS.append((self.times, budget.total))
        shares = torch.ones(budget.shape)
        shares[0] *= 3
        return shares


FITS: list[tuple[int, int]] = []


@dataclass(frozen=True, slots=True)
class Halting(Fixed):
    """Is interrupted the first time, under each parameter."""

    times: int = 1

    def fit(self, probe, importance, budget):
        STATES.append((self.times, probe.saved()))
        if probe.saved() is None:
            probe.save({"step": 3, "of": self.times})
            raise KeyboardInterrupt
        return torch.ones(budget.shape)


STATES: list[tuple[int, object]] = []


def test_learning_goes_on_from_the_state_that_was_kept_under_the_same_settings(tmp_path, monkeypatch, offered):
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_spread)
    settings = make_settings(tmp_path, allocator=offered(Halting), allocator_params={"times": 1}, retentions=(0.4,))
    STATES.clear()
    for times in (1, 2):  # no trial has run yet, so other settings take the study over, but not what was kept in it
        with pytest.raises(KeyboardInterrupt):
            run(replace(settings, allocator_params={"times": times}, resume=times > 1))
    run(replace(settings, allocator_params={"times": 2}, resume=True))
    assert STATES == [(1, None), (2, None), (2, {"step": 3, "of": 2})]


def test_a_level_is_learned_once_and_kept_in_the_study(tmp_path, monkeypatch, offered):
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_spread)
    settings = make_settings(
        tmp_path, allocator=offered(Counted), allocator_params={"times": 7}, retentions=(0.4, 0.2), trials=5
    )
    FITS.clear()
    with monkeypatch.context() as patch:
        StopAt(patch, 2)  # in the trial of the second level, which has been learned but not measured
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    first, second = round(0.4 * CONTEXT * 4), round(0.2 * CONTEXT * 4)
    assert [(7, first), (7, second)] == FITS
    plan = run(replace(settings, resume=True))
    assert [(7, first), (7, second), (7, second)] == FITS, "what was measured is not learned again"
    assert plan.provenance["trials"] == 1 and len(the_study(settings).trials) == 1
    resumed = run(replace(settings, resume=True))
    assert len(FITS) == 3 and all(map(torch.equal, [x.shares for x in resumed.levels], [x.shares for x in plan.levels]))
    with pytest.raises(StudyError, match=r"allocator_params was \{\"times\": 7\}, now \{\"times\": 8\}"):
        run(replace(settings, resume=True, allocator_params={"times": 8}))


@pytest.mark.parametrize("better", [False, True])
def test_what_was_learned_is_stored_only_where_it_beats_uniform(tmp_path, monkeypatch, offered, better):
    def losses(self, capacities):
        for given in losses_by_spread(self, capacities):
            yield 6 - given if better else given

    monkeypatch.setattr(TransformersProbe, "token_losses", losses)
    settings = make_settings(tmp_path, allocator=offered(Counted), allocator_params={"times": 7})
    level = run(settings).levels[0]
    assert level.allocator_params == ({"times": 7} if better else {})
    assert level.comparison["verdict"] == ("better than uniform" if better else "uniform kept: no trial beat it")
    assert bool((level.shares == 0.4).all()) != better


def test_parameters_of_an_allocator_are_for_one_that_learns(tmp_path):
    settings = make_settings(tmp_path, allocator_params={"floor_share": 0.1})
    with pytest.raises(PluginError, match="'baklava' are searched, not given; got floor_share"):
        run(settings)
    settings = make_settings(tmp_path, allocator="learned", allocator_params={"step": 3})
    with pytest.raises(PluginError, match="step"):
        run(settings)


def test_an_allocator_with_nothing_to_search_gives_one_trial(tmp_path):
    settings = make_settings(tmp_path, allocator="uniform", trials=None)
    plan = run(settings)
    assert plan.provenance["trials"] == 1
    assert len(the_study(settings).trials) == 1
    assert torch.equal(plan.levels[0].shares, torch.full((2, 2), 0.4, dtype=torch.float64))


def test_the_number_of_trials_is_chosen_and_kept_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_count, "SEARCH_SECONDS", 0.0)
    settings = make_settings(tmp_path, trials=None)
    assert run(settings).provenance["trials"] == trial_count.LEAST_TRIALS
    monkeypatch.setattr(trial_count, "SEARCH_SECONDS", 1e9)
    assert run(replace(settings, resume=True)).provenance["trials"] == trial_count.LEAST_TRIALS
    assert len(the_study(settings).trials) == trial_count.LEAST_TRIALS


# --- another policy than the window rule


@pytest.mark.parametrize("prefill", [None, 48])
def test_a_plan_for_a_policy_that_scores_is_searched_behind_compressed_prompts(tmp_path, prefill):
    model, corpus = tiny_model("Llama", layers=2), make_corpus()
    settings = make_settings(tmp_path, policy="h2o", context_length=96, prefill_length=prefill)
    plan, length = run(settings, model, corpus), prefill or 48
    policy = registry.create("policy", "h2o")
    assert (plan.method.policy.name, plan.method.policy.params) == ("h2o", policy.params())
    assert {x: plan.provenance[x] for x in ("context_length", "protocol", "prefill_length")} == {
        "context_length": 96,
        "protocol": "prompt",
        "prefill_length": length,
    }
    level, table = plan.levels[0], plan.capacities(length, retention=0.4)
    assert int(table.sum()) == round(0.4 * length * 4), "the budget is the prompt's"
    for part, count in (("search", 4), ("heldout", 8)):
        probe = PromptProbe(model, corpus.sequences(part, count, 96), policy=policy, prefill_length=length)
        assert level.perplexity[part] == pytest.approx(perplexity(probe.loss(table)), rel=1e-6)
    assert level.perplexity["heldout_full"] == pytest.approx(perplexity(probe.full_loss()), rel=1e-6)


def test_a_search_says_how_it_measures_and_what_that_costs(tmp_path):
    class Notes(Progress):
        said = ""

        def note(self, message):
            self.said += message + "\n"

    notes = Notes()
    settings = make_settings(tmp_path, policy="snapkv", context_length=96)
    tune(tiny_model("Llama", layers=2), make_corpus(), settings, progress=notes)
    assert "the loss under snapkv: a prompt of 48 tokens is compressed once; the 48 tokens behind it" in notes.said
    # a level's trials and its uniform, twice the held-out part, that part in full; its prompts, and those to profile
    assert f"at most {(3 + 1) * 4 + 2 * 8 + 8 + 8 + 6} forwards" in notes.said


def test_resume_for_another_policy_is_refused_by_name(tmp_path):
    settings = make_settings(tmp_path, policy="snapkv", context_length=96, trials=1)
    run(settings)
    with pytest.raises(StudyError, match=r'\(policy was \{"name": "snapkv".*, now \{"name": "h2o".*\)'):
        run(replace(settings, policy="h2o", resume=True))
    with pytest.raises(StudyError, match=r"\(prefill_length was null, now 40\)"):
        run(replace(settings, prefill_length=40, resume=True))


# --- pruning


@dataclass(frozen=True, slots=True)
class TwoLevels(BudgetAllocator):
    """Trial by trial from a list: what to be pruned against what."""

    bad: bool = False

    def shares(self, importance: Importance, budget: Budget) -> torch.Tensor:
        shares = torch.ones(budget.shape)
        shares[0, 0] += 40.0 if self.bad else 0.5
        return shares

    @classmethod
    def suggest(cls, trial):
        return cls(bad=trial.suggest_categorical("bad", [True]) if trial.number else False)


def test_a_clearly_bad_trial_is_stopped_and_is_never_the_result(tmp_path, monkeypatch, offered):
    monkeypatch.setattr(TransformersProbe, "token_losses", losses_by_spread)
    settings = make_settings(tmp_path, allocator=offered(TwoLevels), trials=4)
    plan = run(settings)
    study = the_study(settings)
    assert [bool(t.user_attrs.get("kvpolicy_stopped")) for t in study.trials] == [False, True, True, True]
    assert [len(t.intermediate_values) for t in study.trials] == [16, 8, 8, 8], "after two of four sequences"
    assert plan.levels[0].comparison["trials_stopped_early"] == 3
    assert search.best_trial(study).number == 0


def test_a_stopped_trial_with_the_best_value_is_not_the_best(tmp_path):
    study = optuna.create_study()
    for value, stopped in ((2.0, False), (1.0, True), (1.5, False)):
        trial = study.ask()
        trial.set_user_attr("kvpolicy_stopped", stopped)
        study.tell(trial, value)
    assert search.best_trial(study).value == 1.5
    assert search.stopped_trials(study) == 1


# --- interruption


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


class Notes(Progress):
    def __init__(self):
        self.said = []

    def note(self, message):
        self.said.append(message)


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


def test_nothing_is_written_and_nothing_of_optuna_is_changed_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    level = optuna.logging.get_verbosity()
    plan = run(TuneSettings(retentions=(0.4,), context_length=CONTEXT, trials=2, estimator="sensitivity"))
    assert plan.provenance["trials"] == 2 and not list(tmp_path.iterdir())
    assert optuna.logging.get_verbosity() == level
    with pytest.raises(StudyError, match=r"resume=True goes on with a search that was kept: give storage="):
        TuneSettings(resume=True)


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


# --- zombies, torn journals, databases


def running_trial(settings, owner):
    """A study with one trial left running by `owner`."""
    with_study = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    trial = with_study.ask()
    trial.suggest_float("x", 0, 1)
    if owner is not None:
        trial.set_user_attr("kvpolicy_owner", owner)
    return with_study, trial


@pytest.fixture
def here():
    return trials.here()


@pytest.mark.parametrize(
    ("change", "is_zombie"),
    [
        ({}, False),
        ({"pid": 2**22 + 5}, True),
        ({"started": 1.0}, True),
        ({"host": "elsewhere", "pid": 2**22 + 5}, False),
    ],
    ids=["alive", "gone", "its number was given to another process", "on another machine"],
)
def test_only_trials_whose_owner_is_gone_are_closed(tmp_path, here, change, is_zombie):
    study, trial = running_trial(make_settings(tmp_path), {**here, **change})
    assert trials.close_zombies(study) == int(is_zombie)
    assert states(study) == ["FAIL" if is_zombie else "RUNNING"]
    points = [trials.begin(study, {"x": 0.5}, 9).suggest_float("x", 0, 1) for _ in range(2)]
    assert points[0] == 0.5 and (points[1] == trial.params["x"]) == is_zombie


@pytest.mark.parametrize(("seconds", "is_zombie"), [(0, False), (120, True)])
def test_a_trial_without_an_owner_is_closed_after_a_minute(tmp_path, monkeypatch, seconds, is_zombie):
    study, _ = running_trial(make_settings(tmp_path), None)
    now = trials.time.time()
    monkeypatch.setattr(trials.time, "time", lambda: now + seconds)
    assert trials.close_zombies(study) == int(is_zombie)


def test_a_trial_belongs_to_its_process_from_the_moment_it_is_written_down(tmp_path, here, monkeypatch):
    settings = make_settings(tmp_path)
    study = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    seen, plain = [], study.get_trials

    def looking(*args, **more):
        seen.extend(trial.user_attrs["kvpolicy_owner"] for trial in plain(deepcopy=False))
        return plain(*args, **more)

    monkeypatch.setattr(study, "get_trials", looking)
    trials.begin(study, {}, 1)
    assert seen and all(here.items() <= owner.items() for owner in seen)


def test_the_first_point_is_measured_though_its_trial_was_cut_off_twice(tmp_path, here):
    settings = make_settings(tmp_path)
    study = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    for _ in range(2):
        assert trials.begin(study, {"x": 0.25}, 3).number == len(study.trials) - 1
        trials.abandon(study, len(study.trials) - 1)
    assert trials.begin(study, {"x": 0.25}, 3).suggest_float("x", 0, 1) == 0.25
    assert trials.begin(study, {"x": 0.25}, 3).suggest_float("x", 0, 1) != 0.25


def test_of_two_workers_that_begin_the_last_trial_at_once_one_gives_way(tmp_path, monkeypatch):
    settings = make_settings(tmp_path)
    mine = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    theirs = open_study(open_storage(settings.storage), settings.study_name(0.4), {}, resume=True)
    plain = mine.add_trial

    def both(trial):
        trials.begin(theirs, {}, 1)  # between the look at how many there are and our own
        plain(trial)

    monkeypatch.setattr(mine, "add_trial", both)
    assert trials.begin(mine, {}, 1) is None
    assert trials.places_in_use(mine) == 1 and states(mine) == ["RUNNING", "FAIL"]
    trials.abandon(theirs, 0)
    monkeypatch.undo()
    assert trials.begin(mine, {}, 1) is not None, "its place is free again"


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_journal_line_is_cut_and_the_file_kept(tmp_path, cut):
    settings = make_settings(tmp_path, trials=2)
    run(settings)
    content = settings.journal.read_bytes().replace(b'"pid":%d' % psutil.Process().pid, b'"pid":4194309')
    torn = content[:-cut]  # by a process that is gone: no number is above 2^22
    settings.journal.write_bytes(torn)
    assert repair_journal(settings.journal)
    assert settings.journal.read_bytes() == content[: content[:-1].rfind(b"\n") + 1]
    assert settings.journal.with_name("plan.json.study.bak").read_bytes() == torn
    assert not repair_journal(settings.journal), "nothing is left to repair"
    run(replace(settings, resume=True, trials=3))
    assert states(the_study(settings)).count("COMPLETE") == 3


def test_a_whole_journal_is_left_alone(tmp_path):
    settings = make_settings(tmp_path, trials=1)
    run(settings)
    content = settings.journal.read_bytes()
    assert not repair_journal(settings.journal)
    assert settings.journal.read_bytes() == content
    assert not list(tmp_path.glob("*.bak"))
    assert not repair_journal(tmp_path / "none.study")


def test_a_database_works_and_needs_no_journal(tmp_path):
    settings = make_settings(tmp_path, storage=f"sqlite:///{tmp_path / 'study.db'}")
    plan = run(settings)
    assert plan.provenance["trials"] == 3
    assert (tmp_path / "study.db").stat().st_size > 0
    assert settings.journal is None and not (tmp_path / "plan.json.study").exists()
    run(replace(settings, resume=True, trials=4))
    assert states(the_study(settings)) == ["COMPLETE"] * 4


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_tune import make_settings, run
folder = Path(sys.argv[2])
run(make_settings(folder, trials=8, resume=True, storage=f"sqlite:///{folder / 'study.db'}", out=folder / "plan.json"))
"""


def test_two_processes_share_a_database(tmp_path):
    settings = make_settings(tmp_path, trials=1, storage=f"sqlite:///{tmp_path / 'study.db'}")
    run(settings)
    command = [sys.executable, "-c", WORKER, str(ROOT), str(tmp_path)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    found = the_study(settings).trials
    found = [trial for trial in found if trial.state == TrialState.COMPLETE]
    assert len(found) == 8, "as asked, also when both start the last one at once"
    owners = {trial.user_attrs["kvpolicy_owner"]["pid"] for trial in found}
    assert psutil.Process().pid in owners and len(owners) >= 2


@pytest.mark.parametrize(
    "url", ["nosuch://x", "sqlite:////no/such/folder/s.db", "postgresql://nobody@127.0.0.1:1/x"], ids=lambda x: x[:6]
)
def test_a_storage_that_cannot_be_opened_is_refused(tmp_path, url):
    with pytest.raises(StudyError, match="cannot open the study storage"):
        run(make_settings(tmp_path, storage=url))


def test_a_storage_whose_driver_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StudyError, match=r"needs a package that is not installed .* pip install 'psycopg\[binary\]'"):
        run(make_settings(tmp_path, storage="postgresql://nobody@127.0.0.1:1/x"))


# --- what is refused


@pytest.mark.parametrize("retention", [0.0, 1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_a_retention_outside_0_and_1_is_refused(tmp_path, retention):
    with pytest.raises(BudgetError, match=r"must lie in \(0, 1\), got"):
        make_settings(tmp_path, retentions=(0.5, retention))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retentions": ()}, "each retention once, got none"),
        ({"retentions": (0.5, 0.3, 0.5)}, "each retention once, got 0.5, 0.3, 0.5"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"context_length": 63}, "context_length must be at least 64, got 63"),
        ({"prefill_length": 64}, "prefill_length must be below the context of 64, got 64"),
        ({"prefill_length": -1}, "prefill_length must be below the context of 64, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_out_of_range_are_refused(tmp_path, change, message):
    with pytest.raises(BudgetError, match=message):
        make_settings(tmp_path, **change)


def test_a_text_that_is_too_short_is_refused_with_what_is_needed(tmp_path):
    short = Corpus("short", "0" * 64, torch.arange(300) % 97, torch.arange(300) % 97)
    with pytest.raises(TextError, match=r"short is too short: .* 300 tokens .* needs 384 and 256"):
        run(make_settings(tmp_path), corpus=short)
    assert not list(tmp_path.iterdir()), "refused before a study is made"


@pytest.mark.parametrize(
    ("role", "double", "message"),
    [
        ("allocator", BrokenAllocator, "ZeroDivisionError: no head matters"),
        ("estimator", BrokenEstimator, "RuntimeError: no power"),
    ],
)
def test_an_exception_of_a_plugin_names_it(tmp_path, offered, role, double, message):
    with pytest.raises(PluginError, match=rf"^{role} .*{double.__name__}\.\w+ raised {message}"):
        run(make_settings(tmp_path, **{role: offered(double, "mine")}))


def test_a_loss_that_is_not_finite_is_an_error_not_an_endless_search(tmp_path):
    model = tiny_model("Llama", layers=2)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ModelError, match=r"not finite in torch\.float32"):
        run(make_settings(tmp_path), model)


def test_a_database_that_another_process_is_just_creating_is_tried_again(monkeypatch):
    tried = []

    def creating(url):
        tried.append(url)
        if len(tried) == 1:
            raise RuntimeError("duplicate key value violates unique constraint")
        return optuna.storages.InMemoryStorage()

    monkeypatch.setattr(storage, "get_storage", creating)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    assert isinstance(open_storage("postgresql://host/kv"), optuna.storages.InMemoryStorage)


def test_a_missing_driver_is_named_with_what_to_install(monkeypatch):
    def missing(url):
        raise ImportError("Failed to import DB access module")

    monkeypatch.setattr(storage, "get_storage", missing)
    with pytest.raises(StudyError, match=r"needs a package that is not installed .*psycopg\[binary\]"):
        open_storage("postgresql://host/kv")


def test_a_trial_killed_before_its_claim_is_not_counted(tmp_path):
    settings = make_settings(tmp_path, trials=3)
    run(settings)
    the_study(settings).ask()  # left running, by nobody
    run(replace(settings, resume=True, trials=5))
    assert states(the_study(settings)).count("COMPLETE") == 5
