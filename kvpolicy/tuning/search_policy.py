"""The policy's parameters, searched once for all levels: under uniform budgets, at the smallest retention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import optuna
import torch
from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.progress import Progress
from kvpolicy.tuning.costs import metered
from kvpolicy.tuning.probes import Probes
from kvpolicy.tuning.search import chunk_parts, run_trials
from kvpolicy.tuning.search_method import SearchMethod
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.sizes import Sizes
from kvpolicy.tuning.study_notes import StudyNotes
from kvpolicy.tuning.trials import end, outcome_of


@dataclass(frozen=True, slots=True, eq=False)
class PolicySearch:
    """study: at `level`;  sizes: what that means;  probes: those of the search, under a policy"""

    settings: TuneSettings
    method: SearchMethod
    study: optuna.Study
    level: float
    sizes: Sizes
    probes: Callable[[EvictionPolicy], Probes]
    progress: Progress

    @property
    def trials_ahead(self) -> int:
        """At most. A search that has ended stays so, whatever number is asked for when it is resumed: the levels were
        measured under what it came to.
        """
        return 0 if outcome_of(self.study) is not None else StudyNotes(self.study).trials or 0

    def keep_trials(self, trials: int) -> None:
        """How many the search is to have in all."""
        if outcome_of(self.study) is None:
            StudyNotes(self.study).keep_trials(trials)

    def run(self, defaults: Probes) -> SearchMethod:
        """The method with the policy that was found. defaults: the probes under its defaults, which have been made"""
        outcome = outcome_of(self.study)
        if outcome is None:
            notes, names = StudyNotes(self.study), ", ".join(self.method.policy_space())
            self.progress.note(
                f"searched first, once for all levels: {names} of the policy '{self.method.policy_name}', under "
                f"uniform budgets at {self.level:.0%}"
            )
            with metered(defaults.text.model, partial(notes.keep_cost, "search")):
                outcome = end(self.study, self._searched(defaults))
        self.progress.note(self._sentence(outcome))
        return self.method.with_policy(outcome["params"])

    @property
    def facts(self) -> dict[str, Any]:
        """For a plan's provenance, once the search has ended. excess: nats per token above the defaults'"""
        outcome = outcome_of(self.study) or {}
        return {
            self.settings.size: self.level,
            "trials": StudyNotes(self.study).trials,
            "excess": outcome.get("excess"),
        }

    def _searched(self, defaults: Probes) -> dict[str, Any]:
        default, trials = self.method.policy, self.trials_ahead

        def losses(policy: EvictionPolicy) -> Iterable[Tensor]:
            return self._losses(policy, defaults if policy == default else self.probes(policy))

        @cache  # measured before the first trial, and not at all where all trials are done
        def reference() -> list[Tensor]:
            return list(chunk_parts(losses(default)))

        self.progress.begin(f"search {self.method.policy_name} at {self.level:.0%}", trials)
        try:
            best = run_trials(
                self.study,
                type(default),
                losses,
                reference,
                against="its defaults",
                trials=trials,
                seed=self.settings.seed,
                sampler=self.settings.sampler,
                progress=self.progress,
            )
        finally:
            self.progress.end()
        if best is None or best.excess >= 0:
            return {"params": plugin_call.params_of(default), "excess": 0.0}
        return {"params": plugin_call.params_of(self.method.with_policy(best.params).policy), "excess": best.excess}

    def _losses(self, policy: EvictionPolicy, probes: Probes) -> Iterable[Tensor]:
        """Of the search's tokens, under uniform budgets."""
        if policy.window_rule != self.method.policy.window_rule:
            raise PluginError(
                f"the policy '{self.method.policy_name}' is a window rule with some of its parameters and none with "
                f"others ({policy}): their losses cannot be compared; give its parameters instead of searching them"
            )
        target = probes.target
        uniform = torch.ones(target.spec.table_shape)
        return target.token_losses(self.sizes.table(target, policy, uniform, self.level, target.context_length))

    def _sentence(self, outcome: Mapping[str, Any]) -> str:
        name, default = self.method.policy_name, plugin_call.params_of(self.method.policy)
        better = {key: value for key, value in outcome["params"].items() if default.get(key) != value}
        where = f"at {self.level:.0%} under uniform budgets"
        if not better:
            return f"the policy '{name}' keeps its defaults: nothing that was tried is better {where}"
        params = ", ".join(f"{key}={value}" for key, value in better.items())
        return f"the policy '{name}' gets {params}: {outcome['excess']:+.4f} nats per token {where}"
