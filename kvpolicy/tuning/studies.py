"""The studies of a search, one for each retention and one of the policy's parameters: begun anew, or found again by the
settings they were made with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage

from kvpolicy.budget.entry_format import MODEL
from kvpolicy.errors import StudyError, first_line
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning.search import make_pruner
from kvpolicy.tuning.search_method import SearchMethod
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.storage_url import shown
from kvpolicy.tuning.study_notes import StudyNotes

_MEASURED = "dtype"
"""The setting that nobody asks for: a search chooses it, and a study that is resumed has its own."""


Wanted = Mapping[float, tuple[str, Mapping[str, Any]]]
"""What the names of studies begin with and their settings, by retention."""


def shared_settings(settings: TuneSettings, corpus: Corpus, spec: ModelSpec, method: SearchMethod) -> dict[str, Any]:
    """What must agree for a study to be resumed, beside the weights, the dtype and the study's retention."""
    params = plugin_call.params_of
    learned = {} if method.learner is None else {"allocator_params": params(method.learner)}
    searched = {"policy_space": space} if (space := method.policy_space()) else {}
    return (
        learned
        | searched
        | ({} if settings.format == MODEL else {"format": settings.format})
        | {
            "model": spec.config_sha256,
            "text": corpus.sha256,
            "context_length": settings.context_length,
            "objective": settings.objective,
            "sequences": settings.sequences,
            "estimator": {"name": method.estimator_name, "params": params(method.estimator)},
            "allocator": method.allocator_name,
            "policy": method.policy_settings,
            "prefill_length": settings.prefill_length,
            "space": method.search_space(),
            "seed": settings.seed,
            "sampler": settings.sampler,
        }
    )


def level_studies(settings: TuneSettings, shared: Mapping[str, Any]) -> Wanted:
    """One for each level, largest first."""
    levels = sorted(settings.levels, reverse=True)
    return {level: (settings.study_name(level), {**shared, settings.size: level}) for level in levels}


def first_studies(settings: TuneSettings, shared: Mapping[str, Any]) -> Wanted:
    """Those that a search begins with: that of the policy's parameters, at the smallest retention, where they are
    searched, as the others are made for what it finds; else one for each retention.
    """
    if "policy_space" not in shared:
        return level_studies(settings, shared)
    least = min(settings.levels)
    return {least: (settings.policy_study_name, {**shared, settings.size: least})}


def earlier_studies(settings: TuneSettings, storage: BaseStorage, wanted: Wanted) -> list[optuna.Study]:
    """The studies that this search will resume, as far as there are any. Asked before the dtype is chosen, since they
    have one, and found without it, as it is no part of a study's name.
    """
    if not settings.resume:
        return []
    return [study for name, entry in wanted.values() for study in find_studies(storage, name, entry)[-1:]]


def refuse_other_settings(storage: BaseStorage, wanted: Wanted) -> None:
    """For a search that is to be resumed and has no study yet: raises `StudyError` where all that is there was made
    with other settings, before any work.
    """
    for name, entry in wanted.values():
        if others := find_studies(storage, name):
            _check_same(others[-1], entry)


def open_studies(
    settings: TuneSettings, storage: BaseStorage, wanted: Wanted, progress: Progress
) -> dict[float, optuna.Study]:
    """All are opened before any work, so that a refusal costs nothing."""
    studies, aside = {}, 0
    for retention, (name, entry) in wanted.items():
        studies[retention] = open_study(storage, name, entry, resume=settings.resume)
        aside += not settings.resume and bool(find_studies(storage, name))
    if aside:
        progress.note(
            f"a new search is begun; an earlier one is kept in {shown(settings.storage)}, and with its settings "
            "resume=True goes on with it"
        )
    return studies


def find_studies(storage: BaseStorage, name: str, settings: Mapping[str, Any] | None = None) -> list[optuna.Study]:
    """The studies with trials that were begun under `name`, oldest first; with `settings`, those made for them.

    name: without what `open_study` adds to it
    """
    digest = "[0-9a-f]{8}" if settings is None else _digest(settings)
    pattern = re.compile(rf"{re.escape(name)}-{digest}(-(\d+))?")
    studies = []
    for entry in storage.get_all_studies():
        if match := pattern.fullmatch(entry.study_name):
            study = optuna.load_study(study_name=entry.study_name, storage=storage, pruner=make_pruner())
            if StudyNotes(study).are_ours and study.get_trials(deepcopy=False):
                studies.append((int(match[2] or 1), entry._study_id, study))
    return [study for *_, study in sorted(studies, key=lambda numbered: numbered[:2])]


def open_study(storage: BaseStorage, name: str, settings: Mapping[str, Any], *, resume: bool) -> optuna.Study:
    """With `resume` the newest study with these settings, where there is one; otherwise a new one.

    Its name carries a hash of the settings and, behind the first one, a number, so that what is there stays as it is.

    Raises `StudyError` with `resume` where that study has another dtype.
    """
    wanted = _stored(settings)
    earlier = find_studies(storage, name, settings)
    if resume and earlier:
        _check_same(earlier[-1], wanted)
        return earlier[-1]
    base, number = f"{name}-{_digest(settings)}", len(earlier) + 1
    while True:
        full = base if number == 1 else f"{base}-{number}"
        try:
            study = optuna.create_study(
                storage=storage, study_name=full, direction="minimize", pruner=make_pruner(), load_if_exists=True
            )
        except Exception as error:  # each backend raises its own family
            raise StudyError(f"cannot open the study '{full}': {first_line(error)}") from None
        # Without trials there is nothing to lose: a search that ended before its first one, or a worker that began this
        # very search a moment ago. With `resume` it is the latter: two workers are to meet in one study.
        if resume or not study.get_trials(deepcopy=False):
            StudyNotes(study).keep_settings(wanted)
            return study
        number += 1


def _check_same(study: optuna.Study, settings: Mapping[str, Any]) -> None:
    stored, wanted = StudyNotes(study).settings, _stored(settings)
    different = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    if different:
        lines = ", ".join(f"{key} was {_brief(stored.get(key))}, now {_brief(wanted.get(key))}" for key in different)
        raise StudyError(
            f"the study '{study.study_name}' was made with other settings ({lines}): give those again, or leave "
            "out resume=True to begin a new search beside it"
        )


def _stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As a storage gives them back: tuples are lists there."""
    stored: dict[str, Any] = json.loads(json.dumps(settings))
    return stored


def _digest(settings: Mapping[str, Any]) -> str:
    """Of what a user chose, so that a study is found before the dtype is known."""
    chosen = {name: value for name, value in settings.items() if name != _MEASURED}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
