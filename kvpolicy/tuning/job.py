"""The main job: profile, search each level, check on held-out text, make the plan."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage
from torch import Tensor

from kvpolicy.errors import PluginError, TextError
from kvpolicy.evaluate import perplexity, probe_for
from kvpolicy.integrations.transformers import (
    Pace,
    PromptProbe,
    TransformersProbe,
    cast_parameters,
    set_pace,
    weights_sha256,
)
from kvpolicy.interfaces import BudgetAllocator, EvictionPolicy, ImportanceEstimator
from kvpolicy.plan import BudgetPlan, PlanChoice, PlanMethod, PlanModel
from kvpolicy.profiling import profile
from kvpolicy.progress import Progress
from kvpolicy.registry import registry
from kvpolicy.spec import ModelSpec
from kvpolicy.text import Corpus
from kvpolicy.tuning.level import Job, blamed, fitting, learns, search_level
from kvpolicy.tuning.losses import LossJournal
from kvpolicy.tuning.search import search_space
from kvpolicy.tuning.settings import (
    HELDOUT_SEQUENCES,
    LEAST_TRIALS,
    MOST_TRIALS,
    SEARCH_SECONDS,
    SEARCH_SEQUENCES,
    TuneSettings,
)
from kvpolicy.tuning.storage import open_storage, open_study, study_settings

_TRIALS = "kvpolicy_trials"
_OF_LOSSES = ("model", "weights", "text", "context_length", "sequences", "policy", "prefill_length", "dtype")
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

    model: a transformers causal language model; it may be moved to bf16 (`choose_dtype`)

    Raises `PluginError`, `ModelError`, `TextError`, `BudgetError`, `StudyError`; `KeyboardInterrupt` leaves a study
    that `resume=True` goes on with.
    """
    progress = progress or Progress()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    estimator = registry.create("estimator", settings.estimator, settings.estimator_params)
    allocator = registry.get("allocator", settings.allocator)
    policy = registry.create("policy", settings.policy)
    _check_roles(settings, allocator)
    search, heldout = _probes(model, corpus, settings, policy, progress)
    storage = open_storage(settings.storage, settings.journal)  # before any work: an unwritable path fails here
    weights = weights_sha256(model)  # before the dtype may change
    pace = _pace(model, search.sequences[0], settings, storage)
    common = _common_settings(settings, corpus, search.spec, estimator, allocator, policy, pace) | {"weights": weights}
    studies = _open_studies(settings, storage, common)
    seconds = search.seconds() if isinstance(search, PromptProbe) else pace.seconds
    trials = _trial_count(settings, allocator, seconds, storage)
    for study in studies.values():
        study.set_user_attr(_TRIALS, trials)
    profiling = estimator.num_forwards(search.spec, prompts=len(search.prompts), sequences=len(search.sequences))
    _announce(progress, settings, search, heldout, trials, pace, seconds, profiling, learns(allocator))
    known = LossJournal(settings.losses, {name: common[name] for name in _OF_LOSSES}, resume=settings.resume)
    with blamed("estimator", settings.estimator):
        importance = profile(estimator, search, profiling, progress, known)
    progress.begin("held-out text, full cache", 1)
    full = heldout.full_loss()
    progress.advance(f"perplexity {perplexity(full):.3f}")
    progress.end()
    job = Job(settings, search.spec, allocator, importance, search, heldout, full, trials, progress)
    levels = tuple(search_level(job, study, retention) for retention, study in studies.items())
    return BudgetPlan(
        model=PlanModel.from_spec(search.spec, model_id, revision),
        method=PlanMethod(
            estimator=PlanChoice(settings.estimator, estimator.params()),
            allocator=PlanChoice(settings.allocator),
            policy=PlanChoice(settings.policy, policy.params()),
        ),
        importance=importance,
        levels=levels,
        provenance=_provenance(settings, corpus, job, pace),
    )


def _check_roles(settings: TuneSettings, allocator: type[BudgetAllocator]) -> None:
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


def _probes(
    model: Any, corpus: Corpus, settings: TuneSettings, policy: EvictionPolicy, progress: Progress
) -> tuple[TransformersProbe, TransformersProbe]:
    """The search part's probe (with the profiling prompts) and the held-out part's."""
    length = settings.context_length
    held = min(HELDOUT_SEQUENCES, corpus.room("heldout", length))
    if held < SEARCH_SEQUENCES or corpus.room("search", length) < 6:
        raise TextError(
            f"{corpus.name} is too short: after repetitions are dropped it has {len(corpus.search)} tokens to search "
            f"on and {len(corpus.heldout)} to report on, a context of {length} needs {6 * length} and "
            f"{SEARCH_SEQUENCES * length}; give a longer --text or a smaller --context"
        )
    search = corpus.sequences("search", SEARCH_SEQUENCES, length)
    options: dict[str, Any] = {"prefill_length": settings.prefill_length, "batch_size": settings.batch_size}
    return (
        probe_for(
            policy, model, search, corpus.prompts(length), tokenize=corpus.tokenize, progress=progress, **options
        ),
        probe_for(policy, model, corpus.sequences("heldout", held, length), **options),
    )


def _trial_count(settings: TuneSettings, allocator: type[BudgetAllocator], seconds: float, storage: BaseStorage) -> int:
    """Trials of each level: as asked, as a study that is resumed was given, or what fits the time.

    One where nothing is drawn but what the allocator learned is measured.
    """
    if learns(allocator) and not search_space(allocator):
        return 1
    if settings.trials is not None:
        return settings.trials
    if not search_space(allocator):
        return 1
    for attributes in _stored(settings, storage):
        if _TRIALS in attributes:
            return int(attributes[_TRIALS])
    fitting = SEARCH_SECONDS / (len(settings.retentions) * SEARCH_SEQUENCES * seconds)
    return int(min(max(fitting, LEAST_TRIALS), MOST_TRIALS))


def _pace(model: Any, sequence: Tensor, settings: TuneSettings, storage: BaseStorage) -> Pace:
    """A study that is resumed goes on in its dtype: which one is faster may come out otherwise today."""
    dtypes = {str(study_settings(attributes).get("dtype")) for attributes in _stored(settings, storage)}
    if not (settings.choose_dtype and settings.resume and dtypes & {"torch.float32", "torch.bfloat16"}):
        return set_pace(model, sequence, choose_dtype=settings.choose_dtype)
    if model.device.type == "cpu" and "torch.bfloat16" in dtypes:
        cast_parameters(model, torch.bfloat16)
    return set_pace(model, sequence, choose_dtype=False)


def _stored(settings: TuneSettings, storage: BaseStorage) -> list[dict[str, Any]]:
    """Attributes of the studies of this search that are there already."""
    names = {settings.study_name(retention) for retention in settings.retentions}
    return [x.user_attrs for x in optuna.get_all_study_summaries(storage) if x.study_name in names]


def _open_studies(settings: TuneSettings, storage: BaseStorage, common: dict[str, Any]) -> dict[float, optuna.Study]:
    """One study per retention, largest first. All are opened before any work, so that a refusal costs nothing."""
    studies = {}
    for retention in sorted(settings.retentions, reverse=True):
        asked = {**common, "retention": retention}
        studies[retention] = open_study(storage, settings.study_name(retention), asked, resume=settings.resume)
    return studies


def _announce(
    progress: Progress,
    settings: TuneSettings,
    search: TransformersProbe,
    heldout: TransformersProbe,
    trials: int,
    pace: Pace,
    seconds: float,
    profiling: int,
    learning: bool,
) -> None:
    """What it will cost, before it starts.

    seconds: of one sequence in a trial;  profiling: forwards of the estimator
    """
    levels, held, others = len(settings.retentions), len(heldout.sequences), profiling
    scored = levels * ((trials + 1) * SEARCH_SEQUENCES + 2 * held) + held
    if isinstance(search, PromptProbe):
        others += held  # prompts; those of the search have been run
        progress.note(f"the loss under {settings.policy}: {search.described}")
    minutes = max(1, round((scored * seconds + others * pace.seconds) / 60))
    dtype = str(pace.dtype).removeprefix("torch.")
    progress.note(
        f"{levels} levels x {trials} trials x {SEARCH_SEQUENCES} sequences of {settings.context_length} tokens, "
        f"{(2 * levels + 1) * held} held-out sequences and {profiling} of '{settings.estimator}': at most "
        f"{scored + others} forwards, about {minutes} min at {seconds:.2f} s each in {dtype} ({pace.reason})"
    )
    if learning:
        progress.note(f"and what '{settings.allocator}' takes to learn, once for each level")
    elif settings.trials is None:
        progress.note("the number of trials fits this machine; give --trials for the same search elsewhere")


def _common_settings(
    settings: TuneSettings,
    corpus: Corpus,
    spec: ModelSpec,
    estimator: ImportanceEstimator,
    allocator: type[BudgetAllocator],
    policy: EvictionPolicy,
    pace: Pace,
) -> dict[str, Any]:
    """What must agree for a study to be resumed."""
    given = {"allocator_params": fitting(settings).params()} if learns(allocator) else {}
    return given | {
        "model": spec.config_sha256,
        "text": corpus.sha256,
        "context_length": settings.context_length,
        "sequences": SEARCH_SEQUENCES,
        "estimator": {"name": settings.estimator, "params": estimator.params()},
        "allocator": settings.allocator,
        "policy": {"name": settings.policy, "params": policy.params()},
        "prefill_length": settings.prefill_length,
        "space": search_space(allocator),
        "seed": settings.seed,
        "sampler": settings.sampler,
        "dtype": str(pace.dtype),
    }


def _provenance(settings: TuneSettings, corpus: Corpus, job: Job, pace: Pace) -> dict[str, Any]:
    packages = ("torch", "transformers", "optuna")
    return {
        "kvpolicy": version("kvpolicy"),
        "seed": settings.seed,
        "context_length": settings.context_length,
        "protocol": job.search.protocol,
        "prefill_length": job.search.prefill_length,
        "text": corpus.name,
        "text_sha256": corpus.sha256,
        "trials": job.trials,
        "sampler": settings.sampler,
        "search_sequences": SEARCH_SEQUENCES,
        "heldout_sequences": len(job.heldout.sequences),
        "device": str(job.search.model.device),
        "dtype": str(pace.dtype).removeprefix("torch."),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
    }
