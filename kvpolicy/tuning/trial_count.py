"""How many trials each level gets."""

from __future__ import annotations

from collections.abc import Iterable

import optuna

from kvpolicy.tuning.search_method import SearchMethod
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.study_notes import StudyNotes

LEAST_TRIALS, MOST_TRIALS = 8, 40
SEARCH_SECONDS = 200.0
"""Time all levels' trials, and those of the policy, together should fit where `trials` is not given."""


def trial_count(settings: TuneSettings, method: SearchMethod, seconds: float, studies: Iterable[optuna.Study]) -> int:
    """Of each level: `searching_trials`, but one where nothing is drawn, unless a number was asked for; always one of
    what the allocator has learned.
    """
    draws_nothing = not method.search_space()
    if draws_nothing and (method.learner is not None or settings.trials is None):
        return 1
    return searching_trials(settings, method, seconds, studies)


def searching_trials(
    settings: TuneSettings, method: SearchMethod, seconds: float, studies: Iterable[optuna.Study]
) -> int:
    """As asked, as a study that is resumed was given, or what fits the time. seconds: of one trial"""
    if settings.trials is not None:
        return settings.trials
    for study in studies:
        # Timed again, this machine might give another number, and the sampler's start depends on it.
        if (trials := StudyNotes(study).trials) is not None:
            return trials
    searches = len(settings.levels) + bool(method.policy_space())
    fitting = SEARCH_SECONDS / (searches * seconds)
    return int(min(max(fitting, LEAST_TRIALS), MOST_TRIALS))
