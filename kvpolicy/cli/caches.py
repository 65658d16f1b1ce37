"""Which cache a verb that runs a model was asked for: a plan file, `uniform`, or `full`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvpolicy.cli import options as opt
from kvpolicy.errors import BudgetError, PlanError
from kvpolicy.plan import BudgetPlan, load_plan
from kvpolicy.registry import registry

PlanName = Annotated[str, typer.Argument(help="A plan file, or: uniform, full.", show_default=False)]
Policy = Annotated[str | None, typer.Option(help="Who evicts; default: the plan's, or streaming.", show_default=False)]
Allocator = Annotated[
    str | None, typer.Option(help="Who splits the budget without a plan; default: uniform.", show_default=False)
]
MinTokens = Annotated[int, typer.Option(min=1, help="Entries of a KV head, in the mean, that are kept in any case.")]
DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """What the caches of a run have in common; the retention comes with each.

    name: "uniform", "full", or the path of the plan
    """

    name: str
    plan: BudgetPlan | None
    policy: str | None
    allocator: str | None
    min_tokens: int

    @classmethod
    def of(cls, name: str, policy: str | None, allocator: str | None, min_tokens: int) -> CacheChoice:
        """Checks what can be checked before a model is loaded. Raises what `load_plan` and the registry raise."""
        plan = None if name in ("uniform", "full") else load_plan(name)
        if policy is not None:
            registry.get("policy", policy)
        if allocator is not None:
            registry.get("allocator", allocator)
            if name != "uniform":
                raise BudgetError(f"--allocator goes with uniform: {name} leaves nothing to be split")
        return cls(name, plan, policy, allocator, min_tokens)

    @property
    def model(self) -> str:
        """The model to take where none was named."""
        return (self.plan.model.id if self.plan else "") or DEFAULT_MODEL

    @property
    def policy_name(self) -> str:
        return self.policy or (self.plan.method.policy.name if self.plan else "streaming")

    def check(self, retention: float | None) -> None:
        """Refuses a retention that these caches cannot have. Raises `PlanError` or `BudgetError`."""
        if retention is None:
            return
        if self.name == "full":
            raise PlanError("full keeps everything; leave --retention out, or take uniform")
        opt.check_retention(retention)
        if self.plan is not None:
            self.plan.shares_at(retention)

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
            **more,
        )
