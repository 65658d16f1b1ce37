"""What a cache was made from: enough to say it, and to make the cache again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpolicy_kernels.formats import EntryFormat

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import Format, LayerFormats, format_of, least_entries
from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.budget.plan_parts import read_shared_layers
from kvpolicy.cache.state import flag
from kvpolicy.cache.store import DecodeMode
from kvpolicy.errors import BudgetError, PlanError, PluginError
from kvpolicy.files.fields import Fields, number, sequence, text, whole
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.checks import is_json
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy

_MOST = 2**31 - 1  # more tokens than a cache can see


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """The arguments of `new_cache`, names looked up.

    allocator:   None under a plan
    plan_sha256: identity of the plan where the plan itself is not at hand
    entry_format: of keys and values; None for the model's dtype
    shared_layers: as in `ModelSpec.sharing`
    """

    policy: EvictionPolicy
    allocator: BudgetAllocator | None
    plan: BudgetPlan | None
    ask: Ask
    protected: tuple[tuple[int, ...], ...]
    decode: DecodeMode
    rollback: int
    plan_sha256: str | None = None
    entry_format: Format = None
    shared_layers: Mapping[int, int] = field(default_factory=dict)

    @property
    def splitter(self) -> BudgetAllocator | None:
        """The allocator, where it splits at run time."""
        return None if self.allocator is None or self.allocator.split_scope == "none" else self.allocator

    @property
    def least_entries(self) -> int:
        """Of a KV head."""
        return least_entries(self.policy, self.entry_format)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; of a plan its identity alone.

        Raises `PluginError` for a policy or an allocator that cannot be made again from a name and parameters.
        """
        document = {
            "policy": _named("policy", self.policy),
            "allocator": None if self.allocator is None else _named("allocator", self.allocator),
            "plan_sha256": self.plan_sha256 if self.plan is None else self.plan.sha256,
            "retention": None if self.ask.retention is None else float(self.ask.retention),
            "tokens": self.ask.tokens,
            "context_length": self.ask.context_length,
            "min_tokens": self.ask.min_tokens,
            "protected": [[min(x, _MOST) for x in span] for span in self.protected],
            "decode": self.decode,
            "rollback": min(self.rollback, _MOST),
        }
        if isinstance(self.entry_format, LayerFormats):
            document["entry_format"] = {"layers": [own and _format_json(own) for own in self.entry_format.layers]}
        elif self.entry_format is not None:
            document["entry_format"] = _format_json(self.entry_format)
        if self.shared_layers:
            document["shared_layers"] = [list(pair) for pair in sorted(self.shared_layers.items())]
        return document


def read_recipe(fields: Fields, plan: BudgetPlan | None, needs_plan: bool) -> Recipe:
    """The recipe in JSON values.

    plan:       the plan of the recipe, given again
    needs_plan: whether nothing can be done without it

    Raises `PlanError` for another plan, `PluginError` for plugins that are not there any more.
    """
    expected = fields.read("plan_sha256", text) if fields.has("plan_sha256") else None
    if plan is not None and expected is None:
        raise PlanError("it was made without a plan; leave plan= out")
    if plan is not None and plan.sha256 != expected:
        raise PlanError(f"it was made under another plan (sha256 {expected}, the given one has {plan.sha256})")
    if plan is None and expected is not None and needs_plan:
        raise PlanError(f"its budget grows as a plan says: give that plan again with plan= (sha256 {expected})")
    allocator = _read_plugin("allocator", fields.fields("allocator")) if fields.has("allocator") else None
    policy = _read_plugin("policy", fields.fields("policy"))
    if not isinstance(policy, EvictionPolicy) or not isinstance(allocator, BudgetAllocator | None):
        raise PluginError("its policy or its allocator fills another role now")
    if expected is None and allocator is None:
        raise PlanError(
            f"{fields.path('plan_sha256')} and {fields.path('allocator')} are missing, expected one of them"
        )
    decode = fields.read("decode", text)
    if decode not in ("evict", "append"):
        raise PlanError(f"{fields.path('decode')} is '{decode}', expected 'evict' or 'append'")
    spans = fields.read("protected", sequence)
    return Recipe(
        policy=policy,
        allocator=allocator,
        plan=plan,
        ask=Ask(
            retention=fields.read("retention", number) if fields.has("retention") else None,
            tokens=fields.read("tokens", whole, 1) if fields.has("tokens") else None,
            context_length=fields.read("context_length", whole, 1) if fields.has("context_length") else None,
            min_tokens=fields.read("min_tokens", whole, 1),
        ),
        protected=tuple(_read_span(span, fields.path(f"protected[{i}]")) for i, span in enumerate(spans)),
        decode="append" if decode == "append" else "evict",
        rollback=fields.read("rollback", whole, 0),
        plan_sha256=expected,
        entry_format=_read_formats(fields.fields("entry_format")) if fields.has("entry_format") else None,
        shared_layers=dict(read_shared_layers(fields)),
    )


def _named(role: Literal["policy", "allocator"], plugin: EvictionPolicy | BudgetAllocator) -> dict[str, Any]:
    """The name, the class and the parameters of a plugin."""
    cls, params = type(plugin), plugin_call.params_of(plugin)
    if not is_json(params):
        raise PluginError(f"the parameters of the {role} {cls.__name__} are no JSON values: {params}")
    for name in registry.names(role):
        try:
            if registry.get(role, name) is cls:
                return {"name": name, "class": _qualname(cls), "params": params}
        except PluginError:  # a broken one; it is not ours
            continue
    raise PluginError(
        f"the {role} {_qualname(cls)} is not registered, so it could not be found again: register it "
        "(kvpolicy_register, an entry point in the group 'kvpolicy') to save caches made with it"
    )


def _read_plugin(role: Literal["policy", "allocator"], fields: Fields) -> EvictionPolicy | BudgetAllocator:
    name, params = fields.read("name", text), fields.mapping("params")
    plugin = registry.create("policy", name, params) if role == "policy" else registry.create("allocator", name, params)
    if _qualname(type(plugin)) != fields.read("class", text):
        raise PluginError(
            f"the {role} '{name}' is {_qualname(type(plugin))} here, but was {fields.raw('class')} where the cache was "
            "made"
        )
    return plugin


def _format_json(own: EntryFormat) -> dict[str, Any]:
    document = {"bits": own.bits, "rotated": own.rotated, "centred": own.centred, "exact_recent": own.exact_recent}
    return document if own.key_channels == 1 else document | {"key_channels": own.key_channels}


def _read_formats(fields: Fields) -> Format:
    try:
        if not fields.has("layers"):
            return format_of(_read_format(fields))
        layers = enumerate(fields.read("layers", sequence))
        own = [None if x is None else _read_format(Fields(x, fields.path(f"layers[{i}]"))) for i, x in layers]
        return format_of(LayerFormats(tuple(own)))
    except (ValueError, BudgetError) as error:
        raise PlanError(f"its format is none that there is: {error}") from None


def _read_format(fields: Fields) -> EntryFormat:
    return EntryFormat(
        bits=fields.read("bits", whole, 1),
        rotated=fields.read("rotated", flag),
        centred=fields.has("centred") and fields.read("centred", flag),  # files from before keys had a centre
        exact_recent=fields.read("exact_recent", whole, 0),
        key_channels=fields.read("key_channels", number) if fields.has("key_channels") else 1.0,
    )


def _read_span(value: object, path: str) -> tuple[int, int]:
    first, second = (whole(x, f"{path}[{i}]", 0) for i, x in enumerate(sequence(value, path, 2)))
    return first, second


def _qualname(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
