"""Which cache a verb that runs a model was asked for: a plan file, `uniform`, or `full`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import Format, format_of
from kvpolicy.budget.plan import BudgetPlan, load_plan
from kvpolicy.defaults import MODEL
from kvpolicy.errors import AbsentModelError, BudgetError, ModelError, PlanError
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.progress import Progress
from kvpolicy.verbs import arguments


def chosen_policy(
    plan: BudgetPlan | None, name: str | None, params: Mapping[str, Any] | None = None
) -> tuple[str, EvictionPolicy]:
    """The policy that was asked for, else the plan's with its parameters, else streaming; with these parameters of its
    own over them. Raises `PluginError`.
    """
    own: dict[str, Any] = {}
    if name is None and plan is not None:
        name, own = plan.method.policy.name, plan.method.policy.params
    name = name or "streaming"
    return name, registry.create("policy", name, {**own, **(params or {})})


def check_splits_without_plan(name: str) -> None:
    """Raises `PluginError` for a name that is not registered, `BudgetError` for an allocator that only plans serve."""
    allocator = registry.get("allocator", name)
    if allocator.needs_importance:
        raise BudgetError(
            f"the allocator '{name}' needs importance that was measured on a model: run 'kvpolicy tune' with it and "
            "give the plan"
        )


def check_level(plan: BudgetPlan, retention: float, otherwise: str = "") -> None:
    """Raises `PlanError` for a retention below the plan's levels. otherwise: what else could be done"""
    if plan.level_at(retention) is None:
        known = ", ".join(f"{retention:g}" for retention in sorted(plan.retentions))
        raise PlanError(
            f"retention {retention:g} is below the plan's lowest level; it has {known} and everything up to 1. Tune a "
            f"plan for this retention{otherwise}"
        )


def load_network(
    model: str | Path | None,
    plan: BudgetPlan | None,
    progress: Progress,
    *,
    revision: str | None,
    device: str,
    dtype: str,
) -> tuple[str, Any, Any]:
    """(name, model, tokenizer) of the model that was named, else the plan's, else the built-in one.

    A plan may come from anybody, so its word alone starts no download: that raises `AbsentModelError`.
    """
    by_plan = plan.model.id if plan is not None and not model else ""
    name = str(model or by_plan or MODEL)
    may_download = not by_plan or name == MODEL
    try:
        with progress.wait(f"loading {name}"):
            from kvpolicy.integrations.transformers import load_model

            return name, *load_model(name, revision=revision, device=device, dtype=dtype, download=may_download)
    except ModelError as error:
        if may_download or os.path.exists(name):
            raise
        raise AbsentModelError(name, error) from error


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """What the caches of a run have in common; the retention comes with each.

    name:   "uniform", "full", or the path of the plan
    format: of the entries; None for the plan's own, and without a plan for the model's dtype
    """

    name: str
    plan: BudgetPlan | None
    policy_name: str
    policy: EvictionPolicy
    allocator: str | None
    min_tokens: int
    format: str | Format = None

    @classmethod
    def of(
        cls,
        name: str,
        policy: str | None,
        policy_params: Mapping[str, Any] | None,
        allocator: str | None,
        min_tokens: int,
        format: str | Format = None,
    ) -> CacheChoice:
        """Checks what can be checked before a model is loaded. Raises what `load_plan` and the registry raise."""
        plan = None if name in ("uniform", "full") else load_plan(name)
        evicts, evicting = chosen_policy(plan, policy, policy_params)
        if allocator is not None:
            if name != "uniform":
                raise BudgetError(f"allocator= goes with uniform: {name} leaves nothing to be split")
            check_splits_without_plan(allocator)
        arguments.check_least(1, min_tokens=min_tokens)
        format_of(format)
        return cls(name, plan, evicts, evicting, allocator, min_tokens, format)

    def check(self, retention: float | None, otherwise: str = "") -> None:
        """Refuses a retention that these caches cannot have. Raises `PlanError` or `BudgetError`."""
        if retention is None:
            return
        if self.name == "full":
            raise PlanError("full keeps everything; leave retention= out, or take uniform")
        arguments.check_retention(retention)
        if self.plan is not None:
            check_level(self.plan, retention, otherwise)

    def entry_format(self, retention: float) -> Format:
        """Of the entries at a retention."""
        own = format_of(self.format)
        return own if self.plan is None or self.format is not None else self.plan.entry_format(Ask(retention))

    def make(self, model: Any, retention: float | None, **more: Any) -> Any:
        """A new cache for a loaded model; `more` goes to `new_cache`."""
        from kvpolicy.integrations.transformers import new_cache

        return new_cache(
            model,
            self.plan,
            retention=1.0 if self.name == "full" else retention,
            policy=self.policy,
            allocator=self.allocator,
            min_tokens=self.min_tokens,
            format=self.format,
            **more,
        )
