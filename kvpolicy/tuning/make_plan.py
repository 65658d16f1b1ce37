"""The main job: profile, search each level, check on held-out text, make the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage
from torch import Tensor

from kvpolicy.budget.entry_format import MODEL, Format, named
from kvpolicy.budget.plan import BudgetPlan, PlanModel
from kvpolicy.integrations.transformers import Pace, cast_parameters, own_parameters, set_pace, weights_sha256
from kvpolicy.measure.evaluation import perplexity
from kvpolicy.measure.profiling import profile
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning.announce import Work, announce
from kvpolicy.tuning.auto_formats import AutoFormats, EveryFormat
from kvpolicy.tuning.costs import metered
from kvpolicy.tuning.job import Job
from kvpolicy.tuning.known_losses import known_losses
from kvpolicy.tuning.loss_journal import LossJournal
from kvpolicy.tuning.loss_limit import limit_figures
from kvpolicy.tuning.passkey import PasskeyCheck
from kvpolicy.tuning.passkey_levels import passkey_check, with_passkey_scores
from kvpolicy.tuning.probes import Losses, Probes, make_probes
from kvpolicy.tuning.provenance import calibration, history, provenance
from kvpolicy.tuning.search_levels import search_levels
from kvpolicy.tuning.search_method import SearchMethod
from kvpolicy.tuning.search_policy import PolicySearch
from kvpolicy.tuning.settings import AUTO, TuneSettings
from kvpolicy.tuning.sizes import Sizes
from kvpolicy.tuning.storage import open_storage, storage_errors
from kvpolicy.tuning.studies import (
    earlier_studies,
    first_studies,
    level_studies,
    open_studies,
    refuse_other_settings,
    shared_settings,
)
from kvpolicy.tuning.study_notes import StudyNotes
from kvpolicy.tuning.task_probe import TaskProbe
from kvpolicy.tuning.trial_count import searching_trials, trial_count

_OF_LOSSES = (
    "model",
    "weights",
    "text",
    "context_length",
    "sequences",
    "objective",
    "task",
    "seed",
    "policy",
    "prefill_length",
    "dtype",
    "format",
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
    method = SearchMethod.from_settings(settings)
    is_auto = settings.format == AUTO
    own = None if is_auto else named(settings.format)
    search, heldout, numbers = make_probes(model, corpus, settings, method.policy, own)
    storage = open_storage(settings.storage)  # before any work: an unwritable path fails here
    with progress.wait("timing a forward to say what the search will cost"):
        shared, pace = _shared(model, corpus, settings, method, search, storage)
        studies = open_studies(settings, storage, first_studies(settings, shared), progress)
        policy, sizes = None, Sizes.of(settings, pace.dtype)
        if sizes.by_bytes:
            progress.note(f"bytes are parts of what the full cache takes in {str(sizes.dtype).removeprefix('torch.')}")
        for level in settings.levels:  # what is refused is refused before the work
            sizes.budget(search.target, method.policy, level, search.target.context_length)
        if "policy_space" in shared:
            [(level, study)] = studies.items()
            probes = partial(_search_probes, model, corpus, settings, own)
            policy = PolicySearch(settings, method, study, level, sizes, probes, progress)
        check = passkey_check(model, corpus, settings, method.policy, _shared_notes(studies), numbers)
        work = _work(settings, method, search, studies, policy, check, pace)
    announce(progress, settings, search, heldout, work)
    if policy is not None:  # and from here on it is as if the user had given what is found
        method = policy.run(search)
        search, heldout, _ = make_probes(model, corpus, settings, method.policy, own)
        shared["policy"] = method.policy_settings
        studies = open_studies(settings, storage, level_studies(settings, shared), Progress())  # all was said above
        check = passkey_check(model, corpus, settings, method.policy, _shared_notes(studies), numbers)
    for study in studies.values():
        StudyNotes(study).keep_trials(work.trials)
    notes = _shared_notes(studies)
    of_losses = {name: shared[name] for name in _OF_LOSSES if name in shared}
    journal = LossJournal(settings.losses, of_losses, resume=settings.resume)
    with metered(model, partial(notes.keep_cost, "shared")):
        target = EveryFormat(search.target) if is_auto else search.target
        importance = profile(method.estimator, target, work.profiling, progress, journal)
    plain = heldout if own is None else make_probes(model, corpus, settings, method.policy)[1]
    full = _full_losses(plain, "heldout" if settings.format == MODEL else "full", notes, progress)
    job = Job(settings, sizes, search.text.spec, method, importance, search, heldout, full, work.trials, progress)
    under = partial(_probes_under, model, corpus, settings, method.policy)
    levels, failed = search_levels(job, studies, AutoFormats(job, under) if is_auto else None)
    levels, passkey_facts = with_passkey_scores(job, check, levels)
    origin = provenance(corpus, job, pace)
    searched = [*levels, *([] if failed is None else [failed])]
    if settings.memories:  # from here on a level is named by what it keeps, as in every plan
        pairs = zip(studies, searched, strict=False)
        origin["memory"] = [{"memory": memory, "retention": level.retention} for memory, level in pairs]
        studies = {x.retention: study for x, study in zip(searched, studies.values(), strict=False)}
    origin["calibration"] = calibration(studies, len(searched), policy)
    origin["history"] = history(studies)
    origin["passkey"] = passkey_facts
    if policy is not None:
        origin["policy_search"] = policy.facts
    if settings.max_loss is not None:
        origin["max_loss"] = limit_figures(settings.max_loss, levels, failed)
    return BudgetPlan(PlanModel.from_spec(job.spec, model_id, revision), method.choices, importance, levels, origin)


def _shared(
    model: Any, corpus: Corpus, settings: TuneSettings, method: SearchMethod, search: Probes, storage: BaseStorage
) -> tuple[dict[str, Any], Pace]:
    """What all studies share in their settings, once it is known that the search may begin, and in which dtype."""
    shared = shared_settings(settings, corpus, search.text.spec, method)
    if isinstance(search.answers, TaskProbe):
        shared["task"] = {"question": settings.question, "samples_sha256": search.answers.digest}
    shared["weights"] = weights_sha256(model)  # before the dtype may change
    earlier = earlier_studies(settings, storage, first_studies(settings, shared))
    pace = _pace(model, search.text.sequences[0], settings, earlier)
    shared["dtype"] = str(pace.dtype)
    if settings.resume and not earlier:
        refuse_other_settings(storage, first_studies(settings, shared))
        refuse_other_settings(storage, level_studies(settings, shared))
    return shared, pace


def _search_probes(model: Any, corpus: Corpus, settings: TuneSettings, own: Format, policy: EvictionPolicy) -> Probes:
    return make_probes(model, corpus, settings, policy, own)[0]


def _probes_under(
    model: Any, corpus: Corpus, settings: TuneSettings, policy: EvictionPolicy, own: Format
) -> tuple[Probes, Probes]:
    return make_probes(model, corpus, settings, policy, own)[:2]


def _shared_notes(studies: Mapping[float, optuna.Study]) -> StudyNotes:
    """Of the first study: what all of them share is kept there."""
    return StudyNotes(next(iter(studies.values())))


def _work(
    settings: TuneSettings,
    method: SearchMethod,
    search: Probes,
    studies: Mapping[float, optuna.Study],
    policy: PolicySearch | None,
    check: PasskeyCheck | str,
    pace: Pace,
) -> Work:
    """What there is to do. Times a sequence of the search, and chooses the number of trials."""
    spec, prompts, sequences = search.text.spec, len(search.text.prompts), search.target.num_sequences
    profiling = plugin_call.num_forwards(method.estimator, spec, prompts=prompts, sequences=sequences)
    with metered(search.text.model, partial(_shared_notes(studies).keep_cost, "shared")):
        seconds = search.seconds(pace.seconds)
    trials = trial_count(settings, method, seconds * sequences, studies.values())
    if policy is not None:
        policy.keep_trials(searching_trials(settings, method, seconds * sequences, studies.values()))
    return Work(
        trials=trials,
        policy=0 if policy is None else policy.trials_ahead,
        profiling=profiling,
        passkeys=0 if isinstance(check, str) else check.count,
        pace=pace,
        seconds=seconds,
        learns=method.learner is not None,
    )


def _full_losses(heldout: Probes, part: str, notes: StudyNotes, progress: Progress) -> Losses:
    progress.begin("held-out text, full cache", 1)
    full = known_losses(notes, part, heldout, heldout.full_table)
    answers = "" if full.answers is None else f", answer loss {float(full.answers.mean()):.4f}"
    progress.advance(f"perplexity {perplexity(full.text):.3f}{answers}")
    progress.end()
    return full


def _pace(model: Any, sequence: Tensor, settings: TuneSettings, earlier: list[optuna.Study]) -> Pace:
    """A study that is resumed goes on in its dtype: which one is faster may come out otherwise today."""
    dtypes = {str(StudyNotes(study).settings.get("dtype")) for study in earlier}
    if not (settings.choose_dtype and dtypes & {"torch.float32", "torch.bfloat16"}):
        return set_pace(model, sequence, choose_dtype=settings.choose_dtype)
    if model.device.type == "cpu" and "torch.bfloat16" in dtypes:
        cast_parameters(model, torch.bfloat16)
    return set_pace(model, sequence, choose_dtype=False)
