"""What a search will cost, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.budget.entry_format import OF_A_TOKEN
from kvpolicy.integrations.transformers import Pace
from kvpolicy.progress import Progress
from kvpolicy.tuning.probes import Probes
from kvpolicy.tuning.settings import AUTO, TuneSettings


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do besides the settings.

    trials:    of each level
    policy:    trials of the policy's parameters, before all levels
    profiling: forwards of the estimator
    passkeys:  prompts of the passkey check, each run once for all levels
    seconds:   of one sequence in a trial, on average
    learns:    whether the allocator learns
    """

    trials: int
    policy: int
    profiling: int
    passkeys: int
    pace: Pace
    seconds: float
    learns: bool


def announce(progress: Progress, settings: TuneSettings, search: Probes, heldout: Probes, work: Work) -> None:
    """Says how the loss is measured, how many forwards it takes at most, and about how long."""
    for part in search.parts:
        if part.protocol == "prompt":
            progress.note(f"the loss under {settings.policy}: {part.described}")
    levels, pace = len(settings.levels), work.pace
    in_heldout = sum(probe.num_sequences for probe in heldout.all)
    # where there are answers, they and the text are measured once more, each for itself: a level reports both
    apart = 0 if search.answers is None else sum(probe.num_sequences for probe in search.all)
    scored = levels * ((work.trials + 1) * search.target.num_sequences + apart + 2 * in_heldout) + in_heldout
    if settings.format == AUTO:
        choices = len(OF_A_TOKEN) + 1
        scored += levels * choices * search.target.num_sequences
        progress.note(f"formats: up to {choices} choices of each level are measured once on the search's sequences")
    passkeys = work.passkeys
    plain = work.profiling + _prompts(search, heldout) + passkeys
    of_policy = ""
    if work.policy:  # its defaults are measured once more, and each trial has to run the prompts for itself
        scored += (work.policy + 1) * search.target.num_sequences
        plain += work.policy * sum(part.num_sequences for part in search.parts if part.protocol == "prompt")
        of_policy = f"{work.policy} trials of the policy '{settings.policy}', "
    minutes = max(1, round((scored * work.seconds + plain * pace.seconds) / 60))
    dtype = str(pace.dtype).removeprefix("torch.")
    checks = f", {passkeys} prompts with pass keys" if passkeys else ""
    progress.note(
        f"{of_policy}{levels} levels x {work.trials} trials x {_trial_contents(settings, search)}, "
        f"{(2 * levels + 1) * in_heldout} held-out sequences{checks} and {work.profiling} of '{settings.estimator}': "
        f"at most {scored + plain} forwards, about {minutes} min at {work.seconds:.2f} s each in {dtype} "
        f"({pace.reason})"
    )
    if work.learns:
        progress.note(f"and what '{settings.allocator}' takes to learn, once for each level")
    elif settings.trials is None and work.trials > 1:  # one alone has nothing to do with time: nothing is drawn
        progress.note("the number of trials fits this machine; give trials= for the same search elsewhere")


def _trial_contents(settings: TuneSettings, search: Probes) -> str:
    """The sequences of one trial in words."""
    text = f"{settings.sequences} sequences of {settings.context_length} tokens"
    if search.answers is None:
        return text
    kind = (
        "needle prompts" if settings.task is None else f"question-{settings.question} prompts of {settings.objective}"
    )
    answers = f"{search.answers.num_sequences} {kind} of {search.answers.prefill_length} tokens"
    return answers if settings.goes_by_answers else f"{text} and {answers}"


def _prompts(search: Probes, heldout: Probes) -> int:
    """Prompts that are yet to be run before losses behind them can be measured; those of the target have been."""
    new = [probe for probe in (*search.all, *heldout.all) if probe not in search.parts]
    return sum(probe.num_sequences for probe in new if probe.protocol == "prompt")
