"""Making a cache for a model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache, PreTrainedModel

from kvpolicy.cache import schedule as schedules
from kvpolicy.cache.schedule import MIN_TOKENS, Schedule
from kvpolicy.cache.split import RuntimeSplit
from kvpolicy.cache.store import ROLLBACK, DecodeMode, RaggedStore
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers.attach import attach
from kvpolicy.integrations.transformers.cache import RaggedCache
from kvpolicy.integrations.transformers.exchange import text_config
from kvpolicy.integrations.transformers.parallel import rank_and_size
from kvpolicy.integrations.transformers.sources import RUN_SOURCES, prepare
from kvpolicy.interfaces import BudgetAllocator, EvictionPolicy
from kvpolicy.plan import BudgetPlan
from kvpolicy.registry import registry
from kvpolicy.spec import ModelSpec


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
) -> RaggedCache:
    """An empty cache for one use of `model.generate`, or for a loop over the model. Attaches the model.

    plan:      budgets; without one, `retention` is split by `allocator` ("uniform" if not given)
    retention: kept fraction of the tokens seen, in (0, 1]; None means the plan's level if it has just one
    tokens:    instead, mean entries per KV head of a plan
    context_length: fixes the capacities up front instead of letting them grow with the tokens seen
    policy:    who is evicted; default: the plan's, else "streaming". A registered name or an object
    allocator: a registered name or an object that needs no measured importance
    protected: [begin, end) positions that are never evicted, on top of the capacity
    decode:    "evict" holds the capacity at every step; "append" keeps decoded tokens until the next longer forward
    min_tokens: mean entries per KV head that a growing budget never goes below
    rollback:  last tokens that assisted generation can take back

    Raises `ModelError` for a model that cannot be budgeted, `PlanError` for a plan of another model or a retention
    that it does not reach, `BudgetError` for arguments that contradict each other, `PluginError` for a policy
    that requires what this model cannot supply.
    """
    spec = ModelSpec.from_config(model.config)
    chosen = _policy(plan, policy)
    rank, size = rank_and_size(model)
    split = None
    schedule: Schedule
    if plan is not None:
        if allocator is not None:
            raise BudgetError("a plan and an allocator were given: a plan has its shares already; give one")
        plan.check_model(spec)
        schedule = schedules.from_plan(
            plan,
            retention=retention,
            tokens=tokens,
            context_length=context_length,
            min_tokens=min_tokens,
            tp_size=size,
        )
    else:
        if retention is None or tokens is not None:
            raise BudgetError("without a plan a cache needs retention=, the kept fraction of the tokens seen")
        splitter = _allocator(allocator)
        schedule = schedules.from_allocator(
            splitter,
            chosen,
            spec,
            retention=retention,
            context_length=context_length,
            min_tokens=min_tokens,
            tp_size=size,
        )
        if splitter.split_scope != "none" and retention < 1:
            split = RuntimeSplit(splitter, schedule, chosen.num_sink_tokens + 1)

    def make_store(batch_size: int, heads: tuple[int, int]) -> RaggedStore:
        return RaggedStore(
            spec,
            schedule,
            chosen,
            batch_size=batch_size,
            protected=protected,
            decode=decode,
            split=split,
            heads=None if heads[1] == spec.num_kv_heads else heads,
            supplied=RUN_SOURCES,
        )

    make_store(1, (0, spec.num_kv_heads))  # refuses now what it would refuse at the first token
    attach(model)
    prepare(model, spec, chosen.requires)
    stock = DynamicCache(config=text_config(model)).layers
    return RaggedCache(spec, make_store, stock, rank=rank, rollback=rollback)


def _policy(plan: BudgetPlan | None, policy: str | EvictionPolicy | None) -> EvictionPolicy:
    if isinstance(policy, EvictionPolicy):
        return policy
    if policy is None and plan is not None:
        return registry.create("policy", plan.method.policy.name, plan.method.policy.params)
    return registry.create("policy", policy or "streaming")


def _allocator(allocator: str | BudgetAllocator | None) -> BudgetAllocator:
    if isinstance(allocator, BudgetAllocator):
        return allocator
    return registry.create("allocator", allocator or "uniform")
