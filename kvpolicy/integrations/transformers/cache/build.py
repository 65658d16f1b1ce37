"""Making a cache for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import Format, check_format, format_of, is_centred
from kvpolicy.budget.memory_size import read_memory
from kvpolicy.budget.plan import BudgetPlan, policy_of
from kvpolicy.budget.plan_warnings import warn_if_other_format, warn_if_other_policy
from kvpolicy.cache import schedule as schedules
from kvpolicy.cache.schedule import Schedule
from kvpolicy.cache.size import holds_scores
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.store import ROLLBACK, DecodeMode, RaggedStore
from kvpolicy.cache.weight import byte_budget, even_retention, plan_retention
from kvpolicy.defaults import MIN_TOKENS
from kvpolicy.errors import BudgetError, ModelError
from kvpolicy.integrations.transformers.attention.attachment import attach, attachment_of
from kvpolicy.integrations.transformers.attention.exchange import text_config
from kvpolicy.integrations.transformers.attention.key_centre import key_centres
from kvpolicy.integrations.transformers.attention.sources import RUN_SOURCES, prepare, watch_inputs
from kvpolicy.integrations.transformers.cache.model_state import ModelState
from kvpolicy.integrations.transformers.cache.parallel import rank_and_size
from kvpolicy.integrations.transformers.cache.placement import check_devices
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.cache.recipe import Recipe
from kvpolicy.integrations.transformers.model.wrappers import unwrapped
from kvpolicy.model.spec import Budget, ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy


def new_cache(
    model: PreTrainedModel,
    plan: BudgetPlan | None = None,
    *,
    retention: float | None = None,
    tokens: int | None = None,
    context_length: int | None = None,
    policy: str | EvictionPolicy | None = None,
    allocator: str | BudgetAllocator | None = None,
    protected: Sequence[Sequence[int]] = (),
    decode: DecodeMode = "evict",
    min_tokens: int = MIN_TOKENS,
    rollback: int = ROLLBACK,
    format: str | Format = None,
    memory: float | int | str | None = None,
    shared_layers: Mapping[int, int] | None = None,
) -> RaggedCache:
    """An empty cache for one use of `model.generate`, or for a loop over the model. Attaches the model.

    plan:      budgets; without one, `retention` is split by `allocator` ("uniform" if not given)
    retention: kept fraction of the tokens seen, in (0, 1]; None means the plan's level if it has just one
    tokens:    instead, mean entries per KV head of a plan
    context_length: fixes the capacities up front instead of letting them grow with the tokens seen
    policy:    who is evicted; default: the plan's, else "streaming". A registered name or an object.
               Warns where it is not the one that the plan was tuned for
    allocator: a registered name or an object that needs no measured importance
    protected: [begin, end) positions that are never evicted, on top of the capacity
    decode:    "evict" holds the capacity at every step; "append" keeps decoded tokens until the next longer forward
    min_tokens: mean entries per KV head that a growing budget never goes below
    rollback:  last tokens that assisted generation can take back
    format:    of the entries: "int8"; "int4" or "think", which leave the sink tokens and the last 32 as they are; or
               "model" for the model's dtype; None is the plan's, which may have one for each layer, and without a plan
               "model"
    memory:    instead of `retention`, the bytes of a sequence of `context_length` tokens (or of as many as the plan was
               made on): a part of the full cache's in the model's dtype, in (0, 1], or bytes as "8GiB". All is counted:
               codes, positions, scores, tables, and what stays exact
    shared_layers: layers of the model that keep no entries, each with the earlier layer whose entries it attends over
               (`kvpolicy profile --sharing` finds some); budgets are those of the other layers. None is the plan's

    Raises `ModelError` for a model that cannot be budgeted, `PlanError` for a plan of another model or a retention
    that it does not reach, `BudgetError` for arguments that contradict each other, `PluginError` for a policy
    that requires what this model cannot supply.
    """
    model = unwrapped(model)
    if plan is not None and allocator is not None:
        raise BudgetError("a plan and an allocator were given: a plan has its shares already; give one")
    evicting = policy_of(plan, policy)
    if plan is not None:
        warn_if_other_policy(plan, evicting)
    recipe = Recipe(
        policy=evicting,
        allocator=_allocator(allocator) if plan is None else None,
        plan=plan,
        shared_layers=_shared(plan, shared_layers),
        ask=Ask(retention, tokens, context_length, min_tokens),
        protected=tuple(tuple(span) for span in protected),
        decode=decode,
        rollback=rollback,
    )
    if memory is not None:
        recipe = replace(recipe, ask=_within(memory, recipe, model, format))
    entry_format = format_of(format)
    if plan is not None and format is None:
        entry_format = plan.entry_format(recipe.ask)
    elif plan is not None:
        warn_if_other_format(plan, recipe.ask, entry_format)
    return cache_of(model, replace(recipe, entry_format=entry_format))


def _shared(plan: BudgetPlan | None, shared_layers: Mapping[int, int] | None) -> dict[int, int]:
    """A plan's own, or those that were asked for. Raises `BudgetError` for both."""
    if plan is None or not plan.shared_layers:
        return dict(shared_layers or {})
    if shared_layers is not None:
        raise BudgetError(f"shared_layers= was given, and the plan has its own, {plan.shared_layers}: leave it out")
    return plan.shared_layers


def _within(memory: float | int | str, recipe: Recipe, model: PreTrainedModel, format: str | Format) -> Ask:
    """What bytes come to, for a context that is known."""
    ask, plan, policy = recipe.ask, recipe.plan, recipe.policy
    if ask.retention is not None or ask.tokens is not None:
        raise BudgetError("memory= was given beside retention= or tokens=: give one of them")
    context = ask.context_length or (None if plan is None else plan.provenance.get("context_length"))
    if context is None:
        raise BudgetError("memory= needs context_length=, the tokens whose entries are to go into these bytes")
    whole = ModelSpec.from_config(model.config)
    spec, scored = whole.sharing(recipe.shared_layers), holds_scores(policy, recipe.splitter)
    asked, own = read_memory(memory), format_of(format)
    if isinstance(asked, float):  # of the full cache's, in which no layer shares
        asked *= whole.num_budgeted_layers / spec.num_budgeted_layers

    def budget(entry_format: Format) -> Budget:
        check_format(entry_format, spec)
        return byte_budget(asked, spec, context, model.dtype, policy, entry_format, scored=scored)

    if plan is None:
        retention = even_retention(budget(own))
    else:
        retention = plan_retention(plan, context, budget, lambda level: level.entry_format if format is None else own)
    return replace(ask, retention=retention, context_length=context)


def cache_of(model: PreTrainedModel, recipe: Recipe, fixed: Schedule | None = None) -> RaggedCache:
    """The cache that a recipe describes, empty. fixed: its capacities, where they are known already."""
    spec = ModelSpec.from_config(model.config).sharing(recipe.shared_layers)
    rank, size = rank_and_size(model, spec)
    schedule, split, policy = fixed or schedule_of(recipe, spec, size), None, recipe.policy
    if recipe.splitter is not None and schedule.evicts:
        split = RuntimeSplit(recipe.splitter, schedule, recipe.least_entries)

    centres = key_centres(model, spec) if is_centred(recipe.entry_format) else None

    def make_store(batch_size: int, num_heads: int) -> RaggedStore:
        if num_heads * size != spec.num_kv_heads:
            raise ModelError(
                f"this process holds {num_heads} of the model's {spec.num_kv_heads} KV heads, but it says that {size} "
                "processes share them: load it with transformers' DistributedConfig(tp_size=...)"
            )
        return RaggedStore(
            spec,
            schedule,
            policy,
            batch_size=batch_size,
            protected=recipe.protected,
            decode=recipe.decode,
            split=split,
            heads=None if size == 1 else (rank * num_heads, num_heads),
            supplied=RUN_SOURCES,
            entry_format=recipe.entry_format,
            key_centres=centres,
        )

    check_devices(model, spec)
    make_store(1, spec.num_kv_heads // size)  # refuses now what it would refuse at the first token
    prepare(model, spec, policy.requires)
    attach(model)
    attached = attachment_of(model)  # lives as long as the cache and its copies
    watch_inputs(model, spec, policy.requires, attached)
    return RaggedCache(
        spec,
        make_store,
        DynamicCache(config=text_config(model)).layers,
        attached,
        recipe,
        ModelState(model),
        repeats=schedule.evicts and "repeat_attention" in policy.requires,
        dropped_at=_dropped_at(model),
    )


def _dropped_at(model: PreTrainedModel) -> int | None:
    """`WatchedCache.dropped_at`, of models that prepare their inputs in a way of their own and have such a length."""
    own = (
        getattr(type(model), "prepare_inputs_for_generation", None) is not GenerationMixin.prepare_inputs_for_generation
    )
    return getattr(text_config(model), "original_max_position_embeddings", None) if own else None


def schedule_of(recipe: Recipe, spec: ModelSpec, size: int = 1) -> Schedule:
    """The capacities of a recipe. size: tensor-parallel ranks that share the KV heads."""
    if recipe.plan is not None:
        recipe.plan.check_model(spec)
        return schedules.from_plan(recipe.plan, recipe.ask, size, recipe.least_entries)
    assert recipe.allocator is not None  # there is a plan, or else an allocator
    return schedules.from_allocator(recipe.allocator, recipe.policy, spec, recipe.ask, size, recipe.least_entries)


def _allocator(allocator: str | BudgetAllocator | None) -> BudgetAllocator:
    if isinstance(allocator, BudgetAllocator):
        return plugin_call.admitted(allocator)
    return registry.create("allocator", "uniform" if allocator is None else allocator)
