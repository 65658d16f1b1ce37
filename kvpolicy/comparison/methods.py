"""What is compared: a policy with an allocator or a plan, and the controls that are always there."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.budget.apportion import apportion
from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entries import capacities, context_budget, unmeasured_capacities
from kvpolicy.budget.entry_format import Format, LayerFormats, format_of, least_entries, name_of
from kvpolicy.budget.plan import BudgetPlan, load_plan, policy_of
from kvpolicy.budget.plan_warnings import warn_if_other_policy
from kvpolicy.cache.size import block_nbytes, entry_costs, entry_nbytes, holds_scores
from kvpolicy.cache.weight import even_retention, plan_retention
from kvpolicy.comparison.calibration import calibration_of
from kvpolicy.errors import BudgetError, PlanError, PlanWarning, PluginError
from kvpolicy.model.spec import Budget, ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.hookspecs import Role
from kvpolicy.plugins.params import label_of, parse_named
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy

UNIFORM, RANDOM, FULL = "uniform", "random", "full"
QUANTIZED = ("fp8", "int4", "int2", "kivi4", "kivi2")
"""What transformers' `QuantizedCache`, or KIVI's, may hold the entries in: methods of their own, as quantized/int4."""
_PARTS = re.compile(r"([^/(]*(?:\(.*?\))?)(?:/(.*))?", re.DOTALL)
_AT = "@"
_FORMAT = re.compile(rf"(.+){_AT}([a-z]+[0-9]*)", re.DOTALL)
_LOTS = 16  # of four KV heads with two capacities, a lot leaves the table as it is one time in three


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One way to spend a budget.

    name:      as it stands in the tables
    policy:    who evicts;  policy_name: its registered name
    allocator: who splits the budget; None under a plan, and where nothing is evicted
    shuffled:  capacities go to other KV heads at random: the control that tells whether it matters who has which
    quantized: of `QUANTIZED`, where nothing is evicted and all of it is held in fewer bits; the policy has no say
    entry_format: of the entries; None for the model's dtype
    has_format: whether it was named; else a plan's levels have their own, and `at` says which
    shared_layers: layers that keep no entries, as for `new_cache`: a plan's. Tables are those of the others
    """

    name: str
    policy_name: str
    policy: EvictionPolicy
    allocator_name: str | None = None
    allocator: BudgetAllocator | None = None
    plan: BudgetPlan | None = None
    shuffled: bool = False
    quantized: str | None = None
    entry_format: Format = None
    has_format: bool = False
    shared_layers: Mapping[int, int] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self.evicts_nothing and self.quantized is None and self.entry_format is None

    @property
    def evicts_nothing(self) -> bool:
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
        if self.evicts_nothing:
            return FULL
        return _label("policy", self.policy_name, self.policy) + _suffix(self.control_format)

    @property
    def uniform_name(self) -> str:
        """The method that this one's budgets are compared with: uniform ones under the same policy. '' for none."""
        if self.evicts_nothing:
            return ""
        return f"{_label('policy', self.policy_name, self.policy)}/{UNIFORM}{_suffix(self.control_format)}"

    @property
    def control_format(self) -> Format:
        """That of the uniform budgets: a plan's, where all its levels have the same one in all layers."""
        only = next(iter(self._formats)) if len(self._formats) == 1 else None
        return None if isinstance(only, LayerFormats) else only

    @property
    def has_formats(self) -> bool:
        """Whether entries are kept in another format than the model's dtype, at some retention at least."""
        return self._formats != {None}

    @property
    def _formats(self) -> set[Format]:
        """Those of a plan's levels, where none was named."""
        if self.plan is None or self.has_format or self.entry_format is not None:
            return {self.entry_format}
        return {level.entry_format for level in self.plan.levels}

    @property
    def remark(self) -> str:
        """What a reader should know of it: that a plan was tuned for another policy, '' for nothing."""
        if self.plan is None:
            return ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PlanWarning)
            warn_if_other_policy(self.plan, self.policy)
        return "; ".join(str(warning.message) for warning in caught)

    def calibration(self, retention: float) -> dict[str, Any]:
        """What was run on calibration text before this method could be used at this retention, see `calibration_of`."""
        return calibration_of(self.plan, retention)

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for a row to be measured already, as JSON values."""
        allocator, plan = None, None
        if self.allocator is not None:
            allocator = {"name": self.allocator_name, "params": plugin_call.params_of(self.allocator)}
        if self.plan is not None:
            plan = self.plan.sha256
        identity: dict[str, Any] = {
            "policy": {"name": self.policy_name, "params": plugin_call.params_of(self.policy)},
            "allocator": allocator,
            "plan_sha256": plan,
            "shuffled": self.shuffled,
            "quantized": self.quantized,
        }
        if self.entry_format is not None:
            identity["entry_format"] = asdict(self.entry_format)
        if self.shared_layers:
            identity["shared_layers"] = sorted(self.shared_layers.items())
        document: dict[str, Any] = json.loads(json.dumps(identity))  # as a file gives it back: tuples are lists there
        return document

    def at(self, spec: ModelSpec, context: int, retention: float, dtype: torch.dtype) -> Method:
        """The same with the format that it has at this retention, which is one of bytes."""
        if self.has_format or self.plan is None or not self.has_formats:
            return self

        def budget(entry_format: Format) -> Budget:
            return replace(self, entry_format=entry_format)._byte_budget(spec, context, retention, dtype)

        kept = plan_retention(self.plan, context, budget)
        return replace(self, entry_format=self.plan.entry_format(Ask(kept)))

    def table(self, spec: ModelSpec, context: int, retention: float, seed: int, dtype: torch.dtype) -> Tensor:
        """Entries each KV head may keep of `context` tokens, int64 `[L, H]`: as many as take the bytes of a window
        rule's at this retention, positions included. Where scores are held beside the entries, there are fewer.

        dtype: of keys and values

        Of a run-time allocator only the total counts. Raises `BudgetError` and `PlanError` where there is none.
        """
        if self.evicts_nothing:
            return torch.full(spec.table_shape, context)
        own = spec.sharing(self.shared_layers)
        if self.entry_format is None:
            table = self._exact_table(own, context, self._kept(own.num_budgeted_layers, retention))
            total = round(int(table.sum()) * self._window_bytes_part(spec, dtype))
            table = capacities(table, total, context, self.policy.least_capacity)
        else:
            budget = self._byte_budget(spec, context, retention, dtype)
            if self.plan is None:
                kept = even_retention(budget)
            else:
                kept = plan_retention(self.plan, context, lambda _: budget, lambda _: self.entry_format)
            table = apportion(self._exact_table(own, context, kept), budget)
        return _shuffled(table, seed) if self.shuffled else table

    def reaches(self, retention: float) -> bool:
        """Whether a plan says anything of this retention, as far as is known before a model is loaded."""
        if self.plan is None or self.has_formats:  # in which fewer bytes are more entries
            return True
        return self.plan.level_at(self._kept(self.plan.model.table_shape[0], retention)) is not None

    def kept_table(self, spec: ModelSpec, context: int, retention: float) -> Tensor:
        """The capacities at exactly this retention, int64 `[L, H]`, with what stays exact in each of them. It is one of
        the layers that keep entries.
        """
        if self.evicts_nothing:
            return torch.full(spec.table_shape, context)
        table = self._exact_table(spec.sharing(self.shared_layers), context, retention)
        least = least_entries(self.policy, self.entry_format)
        return capacities(table, int(table.sum()), context, least)

    def _kept(self, layers: int, retention: float) -> float:
        """The retention of so many layers that keep entries, at one of the whole model."""
        part = layers / (layers + len(self.shared_layers))
        return min(1.0, round(retention / part, 9)) if self.shared_layers else retention

    def _exact_table(self, spec: ModelSpec, context: int, retention: float) -> Tensor:
        """The capacities at exactly this retention, int64 `[L, H]`."""
        if self.plan is not None:
            self.plan.check_model(spec)
            return self.plan.capacities(context, retention)
        assert self.allocator is not None  # else nothing is evicted
        total = spec.total_entries(retention, context)
        budget = context_budget(total, spec.table_shape, context, self.policy.least_capacity)
        return unmeasured_capacities(self.allocator, budget)

    def _byte_budget(self, spec: ModelSpec, context: int, retention: float, dtype: torch.dtype) -> Budget:
        """The bytes of a window rule's entries in the model's dtype, less what is exact here; the fewest entries at
        least.
        """
        scored = holds_scores(self.policy, self.runtime_allocator)
        allowed = spec.total_entries(retention, context) * entry_nbytes(spec, dtype, scored=False)
        spec = spec.sharing(self.shared_layers)
        allowed -= block_nbytes(spec, dtype.itemsize, self.policy, self.entry_format)
        cost = entry_costs(spec, dtype, scored=scored, entry_format=self.entry_format)
        floor = min(least_entries(self.policy, self.entry_format), context)
        total = min(max(allowed, floor * int(cost.sum())), context * int(cost.sum()))
        return Budget(total, spec.table_shape, floor, context, cost)

    def _window_bytes_part(self, spec: ModelSpec, dtype: torch.dtype) -> float:
        """Bytes of an entry under a window rule, as a part of those of an entry here."""
        scored = holds_scores(self.policy, self.runtime_allocator)
        return entry_nbytes(spec, dtype, scored=False) / entry_nbytes(spec, dtype, scored=scored)


def read_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, with the controls: `full`, `random/uniform`, each policy's `uniform`, and each table
    that is not uniform shuffled. Each once; methods of one policy stand together.

    names: POLICY/ALLOCATOR, POLICY (under `uniform`), a plan file (a name that ends in .json, or that is a file),
        POLICY/PLAN (a plan's budgets under another policy), or quantized/ and one of `QUANTIZED`. A policy and an
        allocator may have parameters, as in `snapkv(kernel_size=7)`; behind any of them a format, as in snapkv@int4

    Raises `PluginError` for a name or a parameter that there is none of, `PlanError` for a plan that cannot be read.
    """
    methods = [_full(), _of(RANDOM, UNIFORM)]
    for method in read_asked(names):
        methods += [method] if method.evicts_nothing else [_uniform_of(method), method]
        if not (method.evicts_nothing or method.is_uniform or method.runtime_allocator is not None):
            methods.append(replace(method, name=f"{method.name} shuffled", shuffled=True))
    return _grouped(methods)


def read_asked(names: Sequence[str]) -> list[Method]:
    """The methods of these names alone, as `read_methods` reads them."""
    return [_read(name) for name in names]


def check_asked(methods: Sequence[Method], retentions: Sequence[float], prefill: int | None) -> None:
    """What is known before a model is loaded. prefill: 0 where every token is decoded under the budget

    Raises `BudgetError`, `PlanError` or `PluginError` for the first method that cannot be measured.
    """
    for method in methods:
        if method.allocator is not None and method.allocator.needs_importance:
            raise BudgetError(
                f"{method.name}: the allocator needs importance that was measured on a model: run 'kvpolicy tune' with "
                "it and give the plan"
            )
        below = [r for r in retentions if not method.reaches(r)]
        if method.plan is not None and below:
            known = ", ".join(f"{retention:g}" for retention in method.plan.retentions)
            raise PlanError(f"{method.name} has the levels {known} and nothing below: leave out retention={below[0]:g}")
        if prefill == 0:
            check_decodes(method)


def check_decodes(method: Method) -> None:
    """Raises `PluginError` for a method whose decoding from the first token on cannot be measured."""
    if not method.is_full and (not method.policy.window_rule or method.runtime_allocator or method.quantized):
        raise PluginError(
            f"{method.name}: prefill=0 decodes from the first token on, which is measured under a window rule alone, "
            "with budgets known up front: give prefill=N, a prompt to compress"
        )


def _read(name: str) -> Method:
    if not Path(name).is_file() and (match := _FORMAT.fullmatch(name)) is not None:
        return _in_format(_read(match[1]), name, format_of(match[2]))
    if name == FULL:
        return _full()
    policy, budgets = _parts(name)
    if Path(name).is_file():
        return _of_plan(name, name)
    if policy == "quantized":
        return _quantized(name, budgets or "")
    if budgets and _is_plan(budgets) and parse_named(policy)[0] in registry.names("policy"):
        return _of_plan(name, budgets, policy)
    if _is_plan(name):
        return _of_plan(name, name)  # which says why it cannot be read
    if not policy or budgets == "":
        raise PluginError(f"a method is POLICY/ALLOCATOR, POLICY, POLICY/PLAN, or a plan file, got '{name}'")
    return _of(policy, budgets or UNIFORM)


def _in_format(method: Method, name: str, entry_format: Format) -> Method:
    """A method with entries in a format. Raises `PluginError` for one whose entries have one already."""
    if method.quantized:
        raise PluginError(f"'{name}': entries that transformers quantizes have a format of their own; leave one out")
    named = name if method.plan is not None else f"{method.name}{_AT}{name_of(entry_format)}"
    named = named if entry_format or method.plan is not None else method.name
    return replace(method, name=named, entry_format=entry_format, has_format=True)


def _parts(name: str) -> tuple[str, str | None]:
    """What stands in front of the first slash that is not inside parentheses, and behind it; None without a slash."""
    match = _PARTS.fullmatch(name)
    return (name, None) if match is None else (match[1], match[2])


def _is_plan(name: str) -> bool:
    return name.endswith(".json") or Path(name).is_file()


def _of_plan(name: str, path: str, policy: str | None = None) -> Method:
    """A plan's budgets, under its own policy if no other is named."""
    plan = load_plan(path)
    if policy is None:
        named, evicts = plan.method.policy.name, policy_of(plan)
    else:
        named, evicts = parse_named(policy)[0], registry.create("policy", *parse_named(policy))
    return Method(name, named, evicts, plan=plan, shared_layers=plan.shared_layers)


def _quantized(name: str, kind: str) -> Method:
    if kind not in QUANTIZED:
        raise PluginError(f"there is no method '{name}'; there is: {', '.join(f'quantized/{x}' for x in QUANTIZED)}")
    return replace(_full(), name=name, quantized=kind)


def _of(policy: str, allocator: str) -> Method:
    (evicting, evicts_params), (splitting, splits_params) = parse_named(policy), parse_named(allocator)
    evicts = registry.create("policy", evicting, evicts_params)
    splits = registry.create("allocator", splitting, splits_params)
    name = f"{_label('policy', evicting, evicts)}/{_label('allocator', splitting, splits)}"
    return Method(name, evicting, evicts, splitting, splits)


def _label(role: Role, name: str, plugin: EvictionPolicy | BudgetAllocator) -> str:
    """The name, with those parameters that are not the defaults."""
    defaults, params = plugin_call.params_of(registry.create(role, name)), plugin_call.params_of(plugin)
    return label_of(name, {key: value for key, value in params.items() if defaults.get(key) != value})


def _full() -> Method:
    """Nothing is evicted, so any policy will do."""
    return Method(FULL, RANDOM, registry.create("policy", RANDOM))


def _uniform_of(method: Method) -> Method:
    allocator, own = registry.create("allocator", UNIFORM), method.control_format
    return Method(method.uniform_name, method.policy_name, method.policy, UNIFORM, allocator, entry_format=own)


def _suffix(entry_format: Format) -> str:
    """What stands behind the names of a method that keeps its entries in a format."""
    return "" if entry_format is None else f"{_AT}{name_of(entry_format)}"


def _shuffled(table: Tensor, seed: int) -> Tensor:
    """The same capacities for other KV heads: the first of some lots that changes the table, if one does."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_LOTS):
        shuffled = table.flatten()[torch.randperm(table.numel(), generator=generator)].view(table.shape)
        if not torch.equal(shuffled, table):
            return shuffled
    return table


def _grouped(methods: Iterable[Method]) -> list[Method]:
    """Each name once, policies in the order in which they came first, so that prompts are run once for each."""
    once: dict[str, Method] = {}
    for method in methods:
        once.setdefault(method.name, method)
    policies = [method.policy_label for method in once.values()]
    return sorted(once.values(), key=lambda method: policies.index(method.policy_label))
