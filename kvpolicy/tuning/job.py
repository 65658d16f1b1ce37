"""The main job: profile, search each level, check on held-out text, make the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage
from torch import Tensor

from kvpolicy.budget.plan import BudgetPlan, PlanChoice, PlanLevel, PlanMethod, PlanModel
from kvpolicy.errors import PluginError, TextError
from kvpolicy.integrations.transformers import Pace, cast_parameters, own_parameters, set_pace, weights_sha256
from kvpolicy.measure.evaluation import perplexity
from kvpolicy.measure.profiling import profile
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning.announce import Work, announce
from kvpolicy.tuning.costs import metered
from kvpolicy.tuning.known_losses import known_losses
from kvpolicy.tuning.level import Job, fitting, learns
from kvpolicy.tuning.levels import check_passkeys, limit_figures, search_levels
from kvpolicy.tuning.losses import LossJournal
from kvpolicy.tuning.passkey import PasskeyCheck, passkey_questions
from kvpolicy.tuning.probes import Losses, Probes, make_probes
from kvpolicy.tuning.search import search_space
from kvpolicy.tuning.settings import LEAST_TRIALS, MOST_TRIALS, SEARCH_SECONDS, TuneSettings
from kvpolicy.tuning.storage import find_studies, open_storage, open_study, storage_errors
from kvpolicy.tuning.storage_url import shown
from kvpolicy.tuning.study_notes import StudyNotes

_OF_LOSSES = (
    "model",
    "weights",
    "text",
    "context_length",
    "sequences",
    "objective",
    "seed",
    "policy",
    "prefill_length",
    "dtype",
)
"""The settings that a loss depends on, beside the capacities."""


def tune(
    model: Any,
    corpus: Corpus,
    settings: TuneSettings,
    *,
    model_id: str = "",
    revision: str | None = None,
    progress: Progress | None = None,
) -> BudgetPlan:
    """Searches budgets for one model on one text and returns the plan; saving it is the caller's.

    model: a transformers causal language model; while it is searched on, it may run in bf16 (`choose_dtype`)

    Raises `PluginError`, `ModelError`, `TextError`, `BudgetError` (also where no retention keeps within `max_loss`),
    `StudyError`; after a `KeyboardInterrupt` `resume=True` goes on with what is in `settings.storage`.
    """
    with storage_errors(settings.storage), _quiet_optuna(), own_parameters(model):
        return _tune(model, corpus, settings, model_id, revision, progress or Progress())


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """What optuna says of each trial is said by `progress`; its level is the caller's again afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _tune(
    model: Any, corpus: Corpus, settings: TuneSettings, model_id: str, revision: str | None, progress: Progress
) -> BudgetPlan:
    estimator, allocator, policy = check_methods(settings)
    search, heldout, asked = make_probes(model, corpus, settings, policy)
    storage = open_storage(settings.storage)  # before any work: an unwritable path fails here
    spec = search.text.spec
    common = _common_settings(settings, corpus, spec, estimator, allocator, policy)
    common["weights"] = weights_sha256(model)  # before the dtype may change
    pace = _pace(model, search.text.sequences[0], settings, _earlier(settings, storage, common))
    common["dtype"] = str(pace.dtype)
    studies = _open_studies(settings, storage, common, progress)
    notes = StudyNotes(next(iter(studies.values())))  # of the first level, which keep what all of them share
    known = LossJournal(settings.losses, {name: common[name] for name in _OF_LOSSES}, resume=settings.resume)
    passkeys = _passkeys(model, corpus, settings, policy, notes, asked)
    prompts, sequences = len(search.text.prompts), search.target.num_sequences
    profiling = plugin_call.num_forwards(estimator, spec, prompts=prompts, sequences=sequences)
    with metered(model, partial(notes.keep_cost, "shared")):
        seconds = search.seconds(pace.seconds)
        trials = _trial_count(settings, allocator, seconds * sequences, studies)
        for study in studies.values():
            StudyNotes(study).keep_trials(trials)
        checked = 0 if isinstance(passkeys, str) else passkeys.count
        announce(
            progress, settings, search, heldout, Work(trials, profiling, checked, pace, seconds, learns(allocator))
        )
        importance = profile(estimator, search.target, profiling, progress, known)
    full = _full_losses(heldout, notes, progress)
    job = Job(settings, spec, allocator, importance, search, heldout, full, trials, progress)
    described = PlanModel.from_spec(spec, model_id, revision)
    method = PlanMethod(
        estimator=PlanChoice(settings.estimator, plugin_call.params_of(estimator)),
        allocator=PlanChoice(settings.allocator),
        policy=PlanChoice(settings.policy, plugin_call.params_of(policy)),
    )
    levels, found = _searched(job, studies, passkeys)
    return BudgetPlan(described, method, importance, levels, _provenance(settings, corpus, job, pace) | found)


def _searched(
    job: Job, studies: dict[float, optuna.Study], passkeys: PasskeyCheck | str
) -> tuple[tuple[PlanLevel, ...], dict[str, Any]]:
    """The levels, and what their search adds to the provenance."""
    limit = job.settings.max_loss
    levels, missed = search_levels(job, studies)
    levels, facts = check_passkeys(job, passkeys, levels)
    found = {"calibration": _calibration(studies, len(levels) + (missed is not None)), "passkey": facts}
    return levels, found if limit is None else found | {"max_loss": limit_figures(limit, levels, missed)}


def check_methods(settings: TuneSettings) -> tuple[ImportanceEstimator, type[BudgetAllocator], EvictionPolicy]:
    """The plugins of a search. Raises `PluginError` for what can be refused without a model."""
    estimator = registry.create("estimator", settings.estimator, settings.estimator_params)
    allocator = registry.get("allocator", settings.allocator)
    policy = registry.create("policy", settings.policy, settings.policy_params)
    _check_allocator(settings, allocator)
    return estimator, allocator, policy


def _check_allocator(settings: TuneSettings, allocator: type[BudgetAllocator]) -> None:
    if allocator.split_scope != "none":
        raise PluginError(
            f"the allocator '{settings.allocator}' splits the budget at run time, prompt by prompt: there is no plan "
            "to search for it"
        )
    if learns(allocator):
        fitting(settings)  # wrong parameters are refused before any work
    elif settings.allocator_params:
        raise PluginError(
            f"the parameters of the allocator '{settings.allocator}' are searched, not given; got "
            f"{', '.join(settings.allocator_params)}"
        )


def _full_losses(heldout: Probes, notes: StudyNotes, progress: Progress) -> Losses:
    progress.begin("held-out text, full cache", 1)
    full = known_losses(notes, "heldout", heldout, heldout.full_table)
    answers = "" if full.answers is None else f", answer loss {float(full.answers.mean()):.4f}"
    progress.advance(f"perplexity {perplexity(full.text):.3f}{answers}")
    progress.end()
    return full


def _passkeys(
    model: Any,
    corpus: Corpus,
    settings: TuneSettings,
    policy: EvictionPolicy,
    notes: StudyNotes,
    asked: frozenset[str],
) -> PasskeyCheck | str:
    """The check, or why there is none. asked: numbers of the search's prompts"""
    try:
        questions = passkey_questions(corpus, settings, asked)
    except TextError as error:
        return str(error)
    return PasskeyCheck(model, corpus.tokenizer, questions, policy, notes, settings.batch_size)


def _calibration(studies: dict[float, optuna.Study], searched: int) -> list[dict[str, Any]]:
    """What was run: for all levels, with retention None, and for each of the levels that were searched."""
    notes = {retention: StudyNotes(study) for retention, study in studies.items()}
    shared = {"retention": None} | next(iter(notes.values())).cost("shared").facts
    begun = list(notes.items())[:searched]
    return [shared, *({"retention": retention} | level.cost("search").facts for retention, level in begun)]


def _trial_count(
    settings: TuneSettings, allocator: type[BudgetAllocator], seconds: float, studies: dict[float, optuna.Study]
) -> int:
    """Trials of each level: as asked, as a study that is resumed was given, or what fits the time.

    seconds: of one trial

    One where nothing is drawn but what the allocator learned is measured.
    """
    if learns(allocator) and not search_space(allocator):
        return 1
    if settings.trials is not None:
        return settings.trials
    if not search_space(allocator):
        return 1
    for study in studies.values():
        if (kept := StudyNotes(study).trials) is not None:
            return kept
    fitting = SEARCH_SECONDS / (len(settings.retentions) * seconds)
    return int(min(max(fitting, LEAST_TRIALS), MOST_TRIALS))


def _pace(model: Any, sequence: Tensor, settings: TuneSettings, earlier: list[optuna.Study]) -> Pace:
    """A study that is resumed goes on in its dtype: which one is faster may come out otherwise today."""
    dtypes = {str(StudyNotes(study).settings.get("dtype")) for study in earlier}
    if not (settings.choose_dtype and dtypes & {"torch.float32", "torch.bfloat16"}):
        return set_pace(model, sequence, choose_dtype=settings.choose_dtype)
    if model.device.type == "cpu" and "torch.bfloat16" in dtypes:
        cast_parameters(model, torch.bfloat16)
    return set_pace(model, sequence, choose_dtype=False)


def _earlier(settings: TuneSettings, storage: BaseStorage, common: dict[str, Any]) -> list[optuna.Study]:
    """The studies to continue, those that there are."""
    if not settings.resume:
        return []
    named = ((settings.study_name(x), common | {"retention": x}) for x in settings.retentions)
    return [study for name, asked in named for study in find_studies(storage, name, asked)[-1:]]


def _open_studies(
    settings: TuneSettings, storage: BaseStorage, common: dict[str, Any], progress: Progress
) -> dict[float, optuna.Study]:
    """One study per retention, largest first. All are opened before any work, so that a refusal costs nothing."""
    studies, aside = {}, 0
    for retention in sorted(settings.retentions, reverse=True):
        name, asked = settings.study_name(retention), common | {"retention": retention}
        studies[retention] = open_study(storage, name, asked, resume=settings.resume)
        aside += not settings.resume and bool(find_studies(storage, name))
    if aside:
        progress.note(
            f"a new search is begun; an earlier one is kept in {shown(settings.storage)}, and with its settings "
            "resume=True goes on with it"
        )
    return studies


def _common_settings(
    settings: TuneSettings,
    corpus: Corpus,
    spec: ModelSpec,
    estimator: ImportanceEstimator,
    allocator: type[BudgetAllocator],
    policy: EvictionPolicy,
) -> dict[str, Any]:
    """What must agree for a study to be resumed, beside the weights and the dtype."""
    given = {"allocator_params": plugin_call.params_of(fitting(settings))} if learns(allocator) else {}
    return given | {
        "model": spec.config_sha256,
        "text": corpus.sha256,
        "context_length": settings.context_length,
        "objective": settings.objective,
        "sequences": settings.sequences,
        "estimator": {"name": settings.estimator, "params": plugin_call.params_of(estimator)},
        "allocator": settings.allocator,
        "policy": {"name": settings.policy, "params": plugin_call.params_of(policy)},
        "prefill_length": settings.prefill_length,
        "space": search_space(allocator),
        "seed": settings.seed,
        "sampler": settings.sampler,
    }


def _provenance(settings: TuneSettings, corpus: Corpus, job: Job, pace: Pace) -> dict[str, Any]:
    packages = ("torch", "transformers", "optuna")
    return {
        "kvpolicy": version("kvpolicy"),
        "seed": settings.seed,
        "context_length": settings.context_length,
        "objective": settings.objective,
        "protocol": job.search.text.protocol,
        "prefill_length": job.search.text.prefill_length,
        "text": corpus.name,
        "text_sha256": corpus.sha256,
        "trials": job.trials,
        "sampler": settings.sampler,
        "search_sequences": settings.sequences,
        "heldout_sequences": job.heldout.text.num_sequences,
        **_needle_facts(job),
        "device": str(job.search.text.model.device),
        "dtype": str(pace.dtype).removeprefix("torch."),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
    }


def _needle_facts(job: Job) -> dict[str, Any]:
    search, heldout = job.search.needles, job.heldout.needles
    if search is None or heldout is None:
        return {}
    counts = {"search": search.num_sequences, "heldout": heldout.num_sequences}
    return {"needles": counts | {"length": search.prefill_length}}
