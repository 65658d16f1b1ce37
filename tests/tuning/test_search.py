"""What a search gives: the same for the same seed, exact, honest about uniform."""

import math
from dataclasses import dataclass, replace

import optuna
import pytest
import torch

from kvpolicy import (
    Budget,
    BudgetAllocator,
    Importance,
    PluginError,
    PromptProbe,
    StudyError,
    TransformersProbe,
    load_plan,
    save_plan,
)
from kvpolicy.integrations.transformers import Pace, cast_parameters
from kvpolicy.measure.evaluation import perplexity
from kvpolicy.plugins.registry import registry
from kvpolicy.progress import Progress
from kvpolicy.report.tables import warnings_of
from kvpolicy.tuning import TuneSettings, make_plan, search, trial_count, tune
from tests.tiny import tiny_model
from tests.tuning.searches import (
    CONTEXT,
    BrokenEstimator,
    Fixed,
    Learned,
    OneHead,
    losses_by_spread,
    make_corpus,
    make_settings,
    points,
    run,
    the_study,
    without_times,
)


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


def test_nothing_is_written_and_nothing_of_optuna_is_changed_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    level = optuna.logging.get_verbosity()
    plan = run(TuneSettings(retentions=(0.4,), context_length=CONTEXT, trials=2, estimator="sensitivity"))
    assert plan.provenance["trials"] == 2 and not list(tmp_path.iterdir())
    assert optuna.logging.get_verbosity() == level
    with pytest.raises(StudyError, match=r"resume=True goes on with a search that was kept: give storage="):
        TuneSettings(resume=True)


@pytest.mark.parametrize("estimator", ["cosine", "broken"])
def test_the_model_and_optuna_are_afterwards_as_they_came(tmp_path, monkeypatch, offered, estimator):
    def faster_in_bf16(model, sequence, *, choose_dtype):
        cast_parameters(model, torch.bfloat16)
        return Pace(0.01, torch.bfloat16, "bf16 is faster here")

    monkeypatch.setattr(make_plan, "set_pace", faster_in_bf16)
    offered(BrokenEstimator, "broken")
    model, level = tiny_model("Llama", layers=2), optuna.logging.get_verbosity()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = make_settings(tmp_path, choose_dtype=True, estimator=estimator, trials=1)
    if estimator == "broken":
        with pytest.raises(PluginError, match="no power"):
            run(settings, model)
    else:
        assert run(settings, model).provenance["dtype"] == "bfloat16"
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert model.dtype == torch.float32 and optuna.logging.get_verbosity() == level
