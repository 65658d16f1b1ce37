"""Where a plan comes from: what was searched with, on what, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import optuna
from optuna.trial import TrialState

from kvpolicy.integrations.transformers import Pace
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning.job import Job
from kvpolicy.tuning.search_policy import PolicySearch
from kvpolicy.tuning.settings import OF_TASK
from kvpolicy.tuning.study_notes import StudyNotes, TrialNotes
from kvpolicy.tuning.task_probe import TaskProbe

_PACKAGES = ("torch", "transformers", "optuna")


def provenance(corpus: Corpus, job: Job, pace: Pace) -> dict[str, Any]:
    """All that was known before the search."""
    settings, text = job.settings, job.search.text
    return {
        "kvpolicy": version("kvpolicy"),
        "seed": settings.seed,
        "context_length": settings.context_length,
        "objective": settings.objective,
        "protocol": text.protocol,
        "prefill_length": text.prefill_length,
        "text": corpus.name,
        "text_sha256": corpus.sha256,
        "trials": job.trials,
        "sampler": settings.sampler,
        "search_sequences": settings.sequences,
        "heldout_sequences": job.heldout.text.num_sequences,
        **_answers(job),
        "device": str(text.model.device),
        "dtype": str(pace.dtype).removeprefix("torch."),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def calibration(
    studies: Mapping[float, optuna.Study], searched: int, policy: PolicySearch | None
) -> list[dict[str, Any]]:
    """What was run: for all levels, with retention None, and for each of the first levels, those that were searched."""
    notes = {retention: StudyNotes(study) for retention, study in studies.items()}
    shared = next(iter(notes.values())).cost("shared")
    if policy is not None:
        for purpose in ("shared", "search"):
            shared.add(**asdict(StudyNotes(policy.study).cost(purpose)))
    levels = list(notes.items())[:searched]
    return [
        {"retention": None} | shared.facts,
        *({"retention": retention} | level.cost("search").facts for retention, level in levels),
    ]


def history(studies: Mapping[float, optuna.Study]) -> list[dict[str, Any]]:
    """Of each level its trials in order: the loss less uniform's, nats per token; None where it was stopped early."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return [
        {
            "retention": retention,
            "loss_minus_uniform": [
                None if TrialNotes(trial).is_stopped or trial.state == TrialState.PRUNED else trial.value
                for trial in study.get_trials(deepcopy=False, states=states)
                if not TrialNotes(trial).is_surplus
            ],
        }
        for retention, study in studies.items()
    ]


def _answers(job: Job) -> dict[str, Any]:
    """What the answers' prompts are, where there are any."""
    search, heldout, settings = job.search.answers, job.heldout.answers, job.settings
    if search is None or heldout is None:
        return {}
    counts = {"search": search.num_sequences, "heldout": heldout.num_sequences, "length": search.prefill_length}
    if not isinstance(search, TaskProbe):
        return {"needles": counts}
    name = settings.objective.removeprefix(OF_TASK)
    files = {} if settings.data is None else {"data": settings.data.name}
    digest = {"samples_sha256": search.digest}
    return {"task": {"name": name, "question": settings.question, **files, **counts, **digest}}
