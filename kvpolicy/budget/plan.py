"""Plan files: what a search found for one model, as validated JSON, and the capacities that follow from it."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.budget import entries
from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import Format, exact_recent
from kvpolicy.budget.plan_card import plan_card
from kvpolicy.budget.plan_parts import (
    PlanChoice,
    PlanLevel,
    PlanMethod,
    PlanModel,
    check_level,
    check_method,
    check_sharing,
    choice_json,
    importance_json,
    kept_fractions,
    least_capacity_of,
    level_json,
    model_json,
    positive,
    read_capacities,
    read_importance,
    read_level,
    read_method,
    read_model,
)
from kvpolicy.errors import BudgetError, KVPolicyError, PlanError, PlanWarning, PluginError
from kvpolicy.files.fields import (
    MAX_BYTES,
    Fields,
    check_json,
    describe,
    number,
    parse,
    read_bytes,
    render,
    sequence,
    whole,
)
from kvpolicy.files.hub import Place, fetch, publish
from kvpolicy.files.regular import write_bytes
from kvpolicy.model.spec import Importance, ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import EvictionPolicy

__all__ = [
    "BudgetPlan",
    "PlanChoice",
    "PlanLevel",
    "PlanMethod",
    "PlanModel",
    "kept_fractions",
    "load_plan",
    "policy_of",
    "save_plan",
]

FORMAT = "kvpolicy-plan"
VERSION, WITH_FORMATS = 1, 2  # the second where a level has formats, or layers share entries
PLAN_FILE = "plan.json"
"""The name of a plan that is shared."""
_SAME_RETENTION = 1e-9
_MAX_LEVELS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class BudgetPlan:
    """A plan. Raises `PlanError`, naming the field, for values that contradict each other."""

    model: PlanModel
    method: PlanMethod
    importance: Importance | None
    levels: tuple[PlanLevel, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.importance is not None and tuple(self.importance.per_head.shape) != self.model.table_shape:
            raise PlanError(
                f"importance.per_head has shape {tuple(self.importance.per_head.shape)}, expected "
                f"(budgeted layers, KV heads) = {self.model.table_shape}"
            )
        if not self.levels:
            raise PlanError("levels is empty, expected at least one level")
        if len(self.levels) > _MAX_LEVELS:
            raise PlanError(f"levels has {len(self.levels)} items, expected at most {_MAX_LEVELS}")
        for index, level in enumerate(self.levels):
            check_level(level, f"levels[{index}]", self.model)
            for earlier in range(index):
                if abs(self.levels[earlier].retention - level.retention) < _SAME_RETENTION:
                    raise PlanError(
                        f"levels[{index}].retention is {level.retention}, which levels[{earlier}] has already; keep one"
                    )
        check_json(self.provenance, "provenance")
        for name, least in (("context_length", 1), ("prefill_length", 0)):
            if self.provenance.get(name) is not None:
                whole(self.provenance[name], f"provenance.{name}", least)

    @classmethod
    def from_capacities(
        cls,
        spec: ModelSpec,
        table: object,
        context_length: int = 4096,
        policy: PlanChoice | str | None = None,
        model_id: str = "",
    ) -> BudgetPlan:
        """A plan of one level from a user's own table.

        table: whole numbers `[L, H]` (tensor, array or nested lists), the entries each KV head keeps of
            `context_length` tokens
        policy: who evicts; None means streaming with 4 sink tokens

        Raises `BudgetError` for a table of another shape, for fractions, and for entries outside
        sink tokens + 1 to `context_length`; `PluginError` for a policy that is not installed.
        """
        if policy is None:
            policy = PlanChoice("streaming", {"num_sink_tokens": 4})
        elif isinstance(policy, str):
            policy = PlanChoice(policy)
        context_length = positive("context_length", context_length)
        capacities = read_capacities(table, spec.table_shape, least_capacity_of(policy), context_length)
        retention = int(capacities.sum()) / (context_length * capacities.numel())
        return cls(
            model=PlanModel.from_spec(spec, model_id),
            method=PlanMethod(None, None, policy),
            importance=None,
            levels=(PlanLevel(retention, capacities.to(torch.float64) / context_length),),
            provenance={"context_length": context_length},
        )

    @property
    def retentions(self) -> tuple[float, ...]:
        """The stored levels, ascending; 1.0 is always there besides."""
        return tuple(sorted(level.retention for level in self.levels))

    @property
    def least_capacity(self) -> int:
        """The fewest entries of a KV head; of a policy that is not installed here, by the sink tokens that the plan
        names.
        """
        try:
            return least_capacity_of(self.method.policy)
        except PluginError:
            return int(self.method.policy.params.get("num_sink_tokens", 0)) + 1

    @property
    def num_sink_tokens(self) -> int:
        """First tokens that every KV head keeps."""
        return self.least_capacity - 1

    def shares_at(self, retention: float) -> Tensor:
        """Kept fractions, float64 `[L, H]`, interpolated linearly between the levels around `retention`.

        Level 1.0 (everything kept) is implicit. Raises `PlanError` below the lowest level and above 1.
        """
        known = self._known()
        if not 0 < number(retention, "retention") <= 1:
            raise PlanError(f"retention is {retention}, expected above 0 and at most 1; the plan has levels {known}")
        lower = self.level_at(retention)
        if lower is None:
            raise PlanError(
                f"retention {retention:g} is below the plan's lowest level; it has {known} and everything up to 1. "
                "Tune a plan for this retention, or give tokens= to scale the lowest level"
            )
        above = [level for level in self.levels if level.retention > retention + _SAME_RETENTION]
        upper = min(above, key=lambda level: level.retention, default=None)
        end, end_shares = (1.0, torch.ones_like(lower.shares)) if upper is None else (upper.retention, upper.shares)
        if end - lower.retention < _SAME_RETENTION:
            return lower.shares.clone()
        weight = min(1.0, max(0.0, (retention - lower.retention) / (end - lower.retention)))
        return lower.shares + weight * (end_shares - lower.shares)

    def entry_format(self, ask: Ask) -> Format:
        """Of the entries of a cache that keeps this much: that of the level which this is, or lies next above."""
        ask = self.completed(ask)
        return self._format_at(ask.fraction(ask.context_length or 1) if ask.retention is None else ask.retention)

    def _format_at(self, retention: float) -> Format:
        level = self.level_at(retention) or min(self.levels, key=lambda level: level.retention)
        return level.entry_format

    def level_at(self, retention: float) -> PlanLevel | None:
        """The stored level that `retention` is or lies next above; None below the lowest one."""
        below = [level for level in self.levels if level.retention <= retention + _SAME_RETENTION]
        return max(below, key=lambda level: level.retention, default=None)

    def capacities(
        self, context_length: int, retention: float | None = None, tokens: int | None = None, tp_size: int = 1
    ) -> Tensor:
        """Entries each KV head may keep of `context_length` tokens, int64 `[L, H]` on the CPU.

        retention: kept fraction over all budgeted layers; None means the plan's level if it has just one
        tokens:    instead of `retention`, mean entries per KV head
        tp_size:   tensor-parallel ranks; rank r owns the r-th run of consecutive KV heads and every rank
            gets the same total (up to one entry)

        The sum is `round(retention * context_length * L * H)`, unless the floors (sink tokens + 1 per KV head, or with
        formats what stays exact) exceed that: then it is theirs. Raises `PlanError` for a retention the plan does not
        reach and `BudgetError` for arguments that cannot be honoured; warns with `PlanWarning` where `tokens` is below
        the lowest level (its shares are scaled) or the context is over four times the one searched on.
        """
        context = positive("context_length", context_length)
        self.warn_if_long(context)
        ask, shape = self.completed(Ask(retention, tokens, context)), self.model.table_shape
        shares = self.shares_at(ask.fraction(context)) if ask.tokens is None else self._shares_for(ask.tokens, context)
        groups = entries.rank_groups(*shape, tp_size)
        least = self.num_sink_tokens + max(exact_recent(self._format_at(ask.fraction(context))), 1)
        return entries.capacities(shares, ask.total(context, shape), context, least, groups)

    def completed(self, ask: Ask) -> Ask:
        """With what the plan knows of it: the retention of its only level; for `tokens`, the context it was made on.

        Raises `PlanError` where it has several levels, `BudgetError` where its context is shorter than what is kept.
        """
        if ask.tokens is None:
            return replace(ask, retention=self._only_level()) if ask.retention is None else ask
        if ask.context_length is not None:
            return ask
        known = self.provenance.get("context_length")
        if known is None or ask.tokens > known:
            raise BudgetError(
                f"tokens={ask.tokens} needs context_length= besides: the plan was made on "
                f"{known or 'an unknown number of'} tokens, fewer than are to be kept"
            )
        return replace(ask, context_length=known)

    @property
    def shared_layers(self) -> dict[int, int]:
        """Layers that keep no entries, each with the one whose entries it attends over, as `new_cache` takes them."""
        return dict(self.model.shared_layers)

    def sharing(self, spec: ModelSpec, shared_layers: Mapping[int, int]) -> BudgetPlan:
        """These budgets for a model in which some layers keep no entries: those of the others, in their proportions, at
        the same retentions, which are parts of what the others would keep.

        spec: the model's own;  shared_layers: as in `ModelSpec.sharing`

        Raises `ModelError` as that does, `PlanError` for a plan of another model.
        """
        self.check_model(spec)
        own = spec.sharing(shared_layers)
        rows = [row for row, layer in enumerate(self.model.budgeted_layers) if layer in own.budgeted_layers]
        pairs = tuple(sorted(shared_layers.items()))
        model = replace(PlanModel.from_spec(own, self.model.id, self.model.revision), shared_layers=pairs)
        return replace(self, model=model, importance=None, levels=tuple(level.of_rows(rows) for level in self.levels))

    def check_model(self, spec: ModelSpec) -> None:
        """Raises `PlanError` if the plan's tables do not fit `spec`; warns if its configuration differs otherwise.

        spec: the model's, with the plan's `shared_layers` (`ModelSpec.sharing`) where it has some
        """
        theirs = PlanModel.from_spec(spec)
        names = ("num_layers", "budgeted_layers", "num_q_heads", "num_kv_heads", "head_dim")
        differing = [
            f"{name} is {_brief(getattr(self.model, name))} in the plan, {_brief(getattr(theirs, name))} in the model"
            for name in names
            if getattr(self.model, name) != getattr(theirs, name)
        ]
        check_sharing(self.model, theirs)
        if differing:
            raise PlanError(
                f"the plan was made for another model ('{self.model.id}'): {'; '.join(differing)}. "
                "Run 'kvpolicy tune' for this model"
            )
        if self.model.config_sha256 not in ("", theirs.config_sha256):
            warnings.warn(
                f"the plan was made for a model of the same shape but another configuration ('{self.model.id}', "
                "config_sha256 differs): its budgets may not suit this model; 'kvpolicy eval' tells",
                PlanWarning,
                stacklevel=2,
            )

    def warn_if_long(self, context_length: int) -> bool:
        """Warns, with `PlanWarning`, of a context over four times the one searched on. Returns whether it did."""
        searched = self.provenance.get("context_length")
        if searched is None or context_length <= 4 * searched:
            return False
        warnings.warn(
            f"the context of {context_length} tokens is over four times the {searched} that the plan was made on: "
            f"check the quality there with 'kvpolicy eval' and context={context_length}",
            PlanWarning,
            stacklevel=3,
        )
        return True

    @property
    def sha256(self) -> str:
        """Identity of the plan: sha256 of the file that `save_plan` writes."""
        return hashlib.sha256(render(self.to_json()).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, in the layout of the plan file."""
        return {
            "format": FORMAT,
            "version": self._version,
            "model": model_json(self.model),
            "method": {name: choice_json(getattr(self.method, name)) for name in PlanMethod.__slots__},
            "importance": importance_json(self.importance),
            "levels": [level_json(level) for level in self.levels],
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, document: object) -> BudgetPlan:
        """The plan in a parsed document. Raises `PlanError` naming the field; unknown fields are ignored."""
        fields = Fields(document)
        if fields.raw("format") != FORMAT:
            raise PlanError(f"format is {describe(fields.raw('format'))}, expected '{FORMAT}'; this is no plan")
        version = fields.raw("version")
        if version not in (VERSION, WITH_FORMATS) or isinstance(version, bool):
            raise PlanError(
                f"version is {describe(version)}, expected {VERSION} or {WITH_FORMATS}; "
                "make the plan again, or use the kvpolicy that wrote it"
            )
        check_json(document, "")
        model = read_model(fields.fields("model"))
        levels = fields.read("levels", sequence)
        plan = cls(
            model=model,
            method=read_method(fields.fields("method")),
            importance=read_importance(fields.fields("importance"), model.table_shape)
            if fields.has("importance")
            else None,
            levels=tuple(read_level(Fields(x, f"levels[{i}]"), model.table_shape) for i, x in enumerate(levels)),
            provenance=fields.mapping("provenance"),
        )
        if plan._version != version:
            has = "a level has formats" if plan._version == WITH_FORMATS else "no level has formats"
            has = "layers share entries" if plan.shared_layers else has
            raise PlanError(f"version is {version}, expected {plan._version}: {has}")
        return plan

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], revision: str | None = None) -> BudgetPlan:
        """The plan in a repository of the Hugging Face Hub, or in a directory that looks like one.

        source:   a Hub id (owner/name), or a directory with a plan.json
        revision: branch, tag or commit; a commit is for ever the same plan

        Nothing but plan.json is fetched, at most 8 MiB of JSON. Raises `PlanError` naming source and field or reason.
        """
        return pull_plan(source, revision)[0]

    def push_to_hub(self, target: str | os.PathLike[str], *, private: bool = False) -> str:
        """Writes plan.json, and a README of the plan's own figures, to a repository of the Hub, or into a directory.

        target:  a Hub id (owner/name), whose repository is made where there is none, or a directory
        private: whether a new repository is for its owner alone

        Returns the commit that holds them, "" for a directory. Raises `PlanError`.
        """
        name = os.fspath(target)
        files = {PLAN_FILE: render(self.to_json()).encode(), "README.md": plan_card(self, name).encode()}
        try:
            return publish(name, files, f"Plan for {self.model.id or 'a model'}", private=private).commit
        except KVPolicyError as error:
            raise PlanError(f"the plan was not pushed: {error}") from None

    @property
    def _version(self) -> int:
        return WITH_FORMATS if self.model.shared_layers or any(level.formats for level in self.levels) else VERSION

    def _known(self) -> str:
        return ", ".join(f"{value:g}" for value in self.retentions)

    def _only_level(self) -> float:
        if len(self.levels) > 1:
            raise PlanError(f"the plan has several levels ({self._known()}): say which with retention= or tokens=")
        return self.levels[0].retention

    def _shares_for(self, tokens: int, context_length: int) -> Tensor:
        """Proportions for this mean number of entries per KV head: below the lowest level, those of the lowest."""
        kept = min(tokens, context_length)
        lowest = min(self.levels, key=lambda level: level.retention)
        if kept / context_length >= lowest.retention:
            return self.shares_at(kept / context_length)
        if kept < math.floor(lowest.retention * context_length):
            warnings.warn(
                f"{tokens} of {context_length} tokens is below the plan's lowest level, retention "
                f"{lowest.retention:g}: its shares are scaled down; tune a lower level to be sure of the quality",
                PlanWarning,
                stacklevel=3,
            )
        return lowest.shares


def policy_of(plan: BudgetPlan | None, policy: str | EvictionPolicy | None = None) -> EvictionPolicy:
    """Who evicts: the policy that was asked for, by name or as an object, else the plan's, else "streaming".

    Raises `PluginError`.
    """
    if isinstance(policy, EvictionPolicy):
        return plugin_call.admitted(policy)
    if policy is None and plan is not None:
        return registry.create("policy", plan.method.policy.name, plan.method.policy.params)
    return registry.create("policy", "streaming" if policy is None else policy)


def load_plan(path: str | os.PathLike[str]) -> BudgetPlan:
    """The plan in the file at `path`. Raises `PlanError` naming the file and the field or the reason."""
    try:
        return BudgetPlan.from_json(parse(read_bytes(path)))
    except PlanError as error:
        raise PlanError(f"plan file '{os.fspath(path)}': {error}") from None


def pull_plan(source: str | os.PathLike[str], revision: str | None = None) -> tuple[BudgetPlan, Place]:
    """As `BudgetPlan.from_pretrained`, and where the plan lay, with its commit."""
    try:
        content, place = fetch(os.fspath(source), PLAN_FILE, revision, MAX_BYTES)
        return BudgetPlan.from_json(parse(content)), place
    except KVPolicyError as error:
        raise PlanError(f"no plan from '{os.fspath(source)}': {error}") from None


def save_plan(plan: BudgetPlan, path: str | os.PathLike[str]) -> None:
    """Writes the plan to `path` in one step: readers see the old file or the new one, never a part.

    Raises `PlanError` naming the path and the reason where it cannot be written.
    """
    try:
        write_bytes(path, render(plan.to_json()).encode())
    except KVPolicyError as error:
        raise PlanError(f"the plan was not saved: {error}") from None


def _brief(value: object) -> str:
    return f"{len(value)} layers {list(value)}" if isinstance(value, tuple) else str(value)
