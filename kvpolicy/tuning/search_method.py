"""The three plugins of a search: who measures, who splits, who evicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import optuna

from kvpolicy.budget.plan import PlanChoice, PlanMethod
from kvpolicy.errors import PluginError
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator
from kvpolicy.tuning.settings import AUTO, TuneSettings

_Searched = TypeVar("_Searched", BudgetAllocator, EvictionPolicy)


@dataclass(frozen=True, slots=True, eq=False)
class SearchMethod:
    """Names and what they mean, looked up once.

    allocator: a class, as its objects are what a search proposes
    learner:   an object of it, where it learns shares from the model instead of being searched; else None
    is_policy_free: whether the user gave the policy no parameters, so that they are searched if it has a `suggest`
    """

    estimator_name: str
    estimator: ImportanceEstimator
    allocator_name: str
    allocator: type[BudgetAllocator]
    learner: BudgetAllocator | None
    policy_name: str
    policy: EvictionPolicy
    is_policy_free: bool

    @classmethod
    def from_settings(cls, settings: TuneSettings) -> SearchMethod:
        """Raises `PluginError` for all that can be refused without a model."""
        estimator = registry.create("estimator", settings.estimator, settings.estimator_params)
        if settings.format == AUTO and not estimator.measures_formats:
            raise PluginError(
                f"format={AUTO} needs an estimator that measures what each format costs, such as fisher, and "
                f"'{settings.estimator}' does not"
            )
        allocator = registry.get("allocator", settings.allocator)
        policy = registry.create("policy", settings.policy, settings.policy_params)
        learner = _learner(allocator, settings)
        return cls(
            estimator_name=settings.estimator,
            estimator=estimator,
            allocator_name=settings.allocator,
            allocator=allocator,
            learner=learner,
            policy_name=settings.policy,
            policy=policy,
            is_policy_free=not settings.policy_params,
        )

    def allocator_with(self, params: dict[str, Any]) -> BudgetAllocator:
        return registry.create("allocator", self.allocator_name, params)

    def search_space(self) -> dict[str, str]:
        """What the allocator's `suggest` asks for: name -> distribution, as text."""
        return _space(self.allocator)

    def policy_space(self) -> dict[str, str]:
        """The same of the policy; empty where it is not searched."""
        return _space(type(self.policy)) if self.is_policy_free else {}

    def with_policy(self, params: Mapping[str, Any]) -> SearchMethod:
        """The same with other parameters of the policy."""
        return replace(self, policy=registry.create("policy", self.policy_name, params))

    @property
    def policy_settings(self) -> dict[str, Any]:
        """As a study records it."""
        return {"name": self.policy_name, "params": plugin_call.params_of(self.policy)}

    @property
    def choices(self) -> PlanMethod:
        """As a plan records it. The allocator's parameters differ from level to level and stand there."""
        return PlanMethod(
            estimator=PlanChoice(self.estimator_name, plugin_call.params_of(self.estimator)),
            allocator=PlanChoice(self.allocator_name),
            policy=PlanChoice(self.policy_name, plugin_call.params_of(self.policy)),
        )


def _space(plugin: type[_Searched]) -> dict[str, str]:
    trial = optuna.create_study().ask()
    plugin_call.suggested(plugin, trial)
    return {name: repr(distribution) for name, distribution in sorted(trial.distributions.items())}


def _learner(allocator: type[BudgetAllocator], settings: TuneSettings) -> BudgetAllocator | None:
    if allocator.split_scope != "none":
        raise PluginError(
            f"the allocator '{settings.allocator}' splits the budget at run time, prompt by prompt: there is no plan "
            "to search for it"
        )
    if allocator.fit is not BudgetAllocator.fit:
        return registry.create("allocator", settings.allocator, settings.allocator_params)
    if settings.allocator_params:
        raise PluginError(
            f"the parameters of the allocator '{settings.allocator}' are searched, not given; got "
            f"{', '.join(settings.allocator_params)}"
        )
    return None
