"""What is compared: a policy with an allocator or a plan, and the controls that are always there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.schedule import Fixed, from_allocator
from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.interfaces import BudgetAllocator, EvictionPolicy
from kvpolicy.plan import BudgetPlan, load_plan
from kvpolicy.plan_json import render
from kvpolicy.registry import registry
from kvpolicy.spec import ModelSpec

UNIFORM, RANDOM, FULL = "uniform", "random", "full"
_LOTS = 16  # of four KV heads with two capacities, a lot leaves the table as it is one time in three


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One way to spend a budget.

    name:      as it stands in the tables
    policy:    who evicts;  policy_name: its registered name
    allocator: who splits the budget; None under a plan, and where nothing is evicted
    shuffled:  capacities go to other KV heads by lot: the control that tells whether it matters who has which
    """

    name: str
    policy_name: str
    policy: EvictionPolicy
    allocator_name: str | None = None
    allocator: BudgetAllocator | None = None
    plan: BudgetPlan | None = None
    shuffled: bool = False

    @property
    def is_full(self) -> bool:
        return self.allocator is None and self.plan is None

    @property
    def is_uniform(self) -> bool:
        return self.allocator_name == UNIFORM

    @property
    def runtime_allocator(self) -> BudgetAllocator | None:
        """The allocator, where it splits at run time."""
        return self.allocator if self.allocator is not None and self.allocator.split_scope != "none" else None

    @property
    def policy_label(self) -> str:
        """The policy's name, with those of its parameters that are not the defaults."""
        own = registry.create("policy", self.policy_name).params()
        others = [f"{name}={value}" for name, value in self.policy.params().items() if own.get(name) != value]
        return f"{self.policy_name}({', '.join(others)})" if others else self.policy_name

    @property
    def uniform_name(self) -> str:
        """The method that this one's budgets are compared with: uniform ones under the same policy."""
        return f"{self.policy_label}/{UNIFORM}"

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What a plan says about the search behind it; None for a method that looks at no calibration text."""
        if self.plan is None or self.plan.method.allocator is None:
            return None
        known = ("trials", "search_sequences", "context_length", "text_sha256")
        return {name: self.plan.provenance[name] for name in known if name in self.plan.provenance}

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for a row to be measured already, as JSON values."""
        allocator, plan = None, None
        if self.allocator is not None:
            allocator = {"name": self.allocator_name, "params": self.allocator.params()}
        if self.plan is not None:
            plan = hashlib.sha256(render(self.plan.to_json()).encode()).hexdigest()
        identity = {
            "policy": {"name": self.policy_name, "params": self.policy.params()},
            "allocator": allocator,
            "plan_sha256": plan,
            "shuffled": self.shuffled,
        }
        found: dict[str, Any] = json.loads(json.dumps(identity))  # as a file gives it back: tuples are lists there
        return found

    def table(self, spec: ModelSpec, context: int, retention: float, seed: int) -> Tensor:
        """Entries each KV head may keep of `context` tokens, int64 `[L, H]`.

        Of a run-time allocator only the total counts. Raises `BudgetError` and `PlanError` where there is none.
        """
        if self.plan is not None:
            self.plan.check_model(spec)
            table = self.plan.capacities(context, retention)
        elif self.allocator is not None:
            schedule = from_allocator(self.allocator, self.policy, spec, retention=retention, context_length=context)
            if not isinstance(schedule, Fixed):
                raise BudgetError(f"{self.name}: its capacities are not known up front")
            table = schedule.table
        else:
            table = torch.full(spec.table_shape, context)
        return _shuffled(table, seed) if self.shuffled else table


def read_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, with the controls: `full`, `random/uniform`, each policy's `uniform`, and each table
    that is not uniform shuffled. Each once; methods of one policy stand together.

    names: POLICY/ALLOCATOR, POLICY (under `uniform`), or a plan file (a name that ends in .json, or that is a file)

    Raises `PluginError` for a name that is not registered, `PlanError` for a plan that cannot be read.
    """
    asked = [_read(name) for name in names if name != FULL]
    methods = [_full(), _of(RANDOM, UNIFORM)]
    for method in asked:
        methods += [_uniform_of(method), method]
        if not method.is_uniform and method.runtime_allocator is None:
            methods.append(replace(method, name=f"{method.name} shuffled", shuffled=True))
    return _grouped(methods)


def _read(name: str) -> Method:
    if name.endswith(".json") or Path(name).is_file():
        plan = load_plan(name)
        tuned = plan.method.policy
        return Method(name, tuned.name, registry.create("policy", tuned.name, tuned.params), plan=plan)
    policy, slash, allocator = name.partition("/")
    if not policy or (slash and not allocator):
        raise PluginError(f"a method is POLICY/ALLOCATOR, POLICY, or a plan file, got '{name}'")
    return _of(policy, allocator or UNIFORM)


def _of(policy: str, allocator: str) -> Method:
    evicts, splits = registry.create("policy", policy), registry.create("allocator", allocator)
    return Method(f"{policy}/{allocator}", policy, evicts, allocator, splits)


def _full() -> Method:
    """Nothing is evicted, so any policy will do."""
    return Method(FULL, RANDOM, registry.create("policy", RANDOM))


def _uniform_of(method: Method) -> Method:
    allocator = registry.create("allocator", UNIFORM)
    return Method(method.uniform_name, method.policy_name, method.policy, UNIFORM, allocator)


def _shuffled(table: Tensor, seed: int) -> Tensor:
    """The same capacities for other KV heads: the first of some lots that changes the table, if one does."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_LOTS):
        found = table.flatten()[torch.randperm(table.numel(), generator=generator)].view(table.shape)
        if not torch.equal(found, table):
            return found
    return table


def _grouped(methods: Iterable[Method]) -> list[Method]:
    """Each name once, policies in the order in which they came first, so that prompts are run once for each."""
    once: dict[str, Method] = {}
    for method in methods:
        once.setdefault(method.name, method)
    policies = [method.policy_label for method in once.values()]
    return sorted(once.values(), key=lambda method: policies.index(method.policy_label))
