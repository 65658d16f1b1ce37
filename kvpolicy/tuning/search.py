"""One study: trials of a plugin's parameters against the loss of the search sequences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import WilcoxonPruner
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from kvpolicy.errors import ModelError
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy
from kvpolicy.progress import Progress
from kvpolicy.tuning.study_notes import TrialNotes
from kvpolicy.tuning.trials import abandon, begin, close_zombies, places_in_use

Sampler = Literal["tpe", "gp"]
CHUNKS = 4
"""Text chunks a sequence's scored tokens are cut into; each is one pair for the Wilcoxon pruner."""
_CHUNK_TOKENS = 8  # fewer say little: a shorter sequence, such as an answer, is one pair

_Searched = TypeVar("_Searched", BudgetAllocator, EvictionPolicy)


@dataclass(frozen=True, slots=True)
class Best:
    """The best trial that ran to its end: its parameters, and its mean loss minus the reference's, nats per token."""

    params: dict[str, Any]
    excess: float


def chunk_parts(losses: Iterable[Tensor]) -> Iterable[Tensor]:
    """Token losses `[batch, n]`, batch by batch -> float64 `[batch, chunks]`: what each chunk adds to its row's mean.

    These are the pairs of Wilcoxon's test. Their sum over the sequences is the mean loss, whatever the chunks' lengths.
    """
    for batch in losses:
        chunks = CHUNKS if batch.shape[1] >= CHUNKS * _CHUNK_TOKENS else 1
        sums = [part.double().sum(1) for part in batch.tensor_split(chunks, dim=1)]
        yield torch.stack(sums, 1) / batch.shape[1]


def run_trials(
    study: optuna.Study,
    plugin: type[_Searched],
    evaluate: Callable[[_Searched], Iterable[Tensor]],
    reference: Callable[[], list[Tensor]],
    *,
    against: str,
    trials: int,
    seed: int,
    sampler: Sampler,
    progress: Progress,
) -> Best | None:
    """Runs trials until the study has `trials` finished ones, and returns the best that ran to its end, if any did.

    plugin:    the class whose `suggest` makes what is measured
    evaluate:  an object of it -> token losses `[batch, n]` of the search sequences, batch by batch
    reference: gives `chunk_parts` of what it is measured against, on the same sequences; asked for before each trial
    against:   what that is called

    The objective is the mean loss above the reference's. A trial that Wilcoxon's test finds worse than the best stops
    early; it counts as finished with the mean so far and is never the result. Interrupted trials are failed and run
    again. Trials that other workers still run are not waited for.
    """
    first = plugin_call.params_of(plugin_call.with_defaults(plugin))
    while (number := _trials_so_far(study)) < trials:
        study.sampler = make_sampler(sampler, seed, len(study.get_trials(deepcopy=False)), trials)
        parts = reference()  # before the trial begins: whoever is interrupted here leaves none behind
        trial = begin(study, first, trials)
        if trial is None:  # another worker was faster; if it is killed, its place is free again: count once more
            continue
        try:
            _run(study, trial, evaluate(plugin_call.suggested(plugin, trial)), parts)
        except BaseException:  # Ctrl-C too: this process may live on, and its trial would be no zombie
            abandon(study, trial.number)
            raise
        best = best_trial(study)
        progress.advance(f"trial {number + 1}/{trials}, best {best.value:+.4f} against {against}" if best else "")
    best = best_trial(study)
    return None if best is None or best.value is None else Best(dict(best.params), best.value)


def _run(study: optuna.Study, trial: optuna.Trial, losses: Iterable[Tensor], reference: list[Tensor]) -> None:
    excess: list[float] = []
    done, sequences = 0, sum(map(len, reference))
    for parts, others in zip(chunk_parts(losses), reference, strict=False):
        done += len(parts)
        for value in (parts - others).flatten().tolist():
            if not math.isfinite(value):
                raise ModelError(f"trial {trial.number}: the model's loss is {value}; another dtype= may help")
            trial.report(value, step=len(excess))
            excess.append(value)
        if done < sequences and trial.should_prune():  # behind the last sequence nothing is saved any more
            TrialNotes(trial).keep_stopped()
            break
    # Complete, not pruned, also where it was stopped: the sampler learns from the mean so far, and the place is used.
    study.tell(trial, sum(excess) / done)


def make_sampler(name: Sampler, seed: int, number: int, trials: int) -> BaseSampler:
    """A sampler for one trial, seeded from (seed, trial number): what it draws does not depend on earlier processes."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    sampler_seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    startup = max(4, min(10, trials // 3))
    if name == "gp":
        return GPSampler(seed=sampler_seed, n_startup_trials=startup)
    return TPESampler(seed=sampler_seed, multivariate=True, n_startup_trials=startup)


def make_pruner() -> WilcoxonPruner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # two sequences at least: on one alone, chunks that are worse together say little about the others
        return WilcoxonPruner(p_threshold=0.1, n_startup_steps=2 * CHUNKS)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best trial that was not stopped early."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    whole = [trial for trial in complete if not TrialNotes(trial).is_stopped]
    return min(whole, key=lambda trial: (trial.value, trial.number), default=None)


def stopped_trials(study: optuna.Study) -> int:
    """How many trials the pruner stopped early."""
    return sum(TrialNotes(trial).is_stopped for trial in study.get_trials(deepcopy=False))


def _trials_so_far(study: optuna.Study) -> int:
    """Those that are done or that somebody runs."""
    close_zombies(study)
    return places_in_use(study)
