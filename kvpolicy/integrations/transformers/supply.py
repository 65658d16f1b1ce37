"""Attaching for the length of a context, and supplying caches to code that makes its own (pipelines, third parties)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attachment import attach, detach, hold, is_attached, release
from kvpolicy.integrations.transformers.build import new_cache
from kvpolicy.integrations.transformers.cache import RaggedCache
from kvpolicy.integrations.transformers.versions import with_cache
from kvpolicy.plan import BudgetPlan


@contextmanager
def attached(model: PreTrainedModel, plan: BudgetPlan | None = None, **options: Any) -> Iterator[None]:
    """Within the context the model runs over caches of kvpolicy; afterwards it is as it was before.

    plan, options: as in `new_cache`. If any is given, every forward that begins with an empty stock cache, or with
        none, gets a new cache of kvpolicy instead. A forward under a cache that cannot be exchanged raises
        `ModelError`, so that a budget is never silently missing. Assisted generation needs a cache of its own
        (`generate(model, new_cache(...), ids, ...)`): it announces itself to the cache before the first forward.

    Raises what `new_cache` raises, before the context begins.
    """
    hold(model)
    handle = None
    try:
        if plan is not None or options:
            if new_cache(model, plan, **options).repeats:  # refuses here what it would refuse in the first forward
                raise ModelError(
                    "this policy requires repeat_attention: the context is repeated behind the prompt, and code that "
                    "makes its own cache does not do that. Give kvpolicy.generate a cache with this policy instead"
                )

            def supply(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return _supplied(args, given, model, lambda: new_cache(model, plan, **options))

            handle = model.register_forward_pre_hook(supply, with_kwargs=True)
        yield
    finally:
        if handle is not None:
            handle.remove()
        release(model)


@contextmanager
def detached(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model has its own attention and its own caches; afterwards it is as it was before."""
    before = is_attached(model)
    detach(model)
    try:
        yield
    finally:
        if before:
            attach(model)


def _supplied(
    args: tuple[Any, ...], given: dict[str, Any], model: PreTrainedModel, make: Callable[[], RaggedCache]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward, with a cache of ours where a stock one would begin, whatever its name is."""
    cache = next((x for x in (*args, *given.values()) if isinstance(x, Cache)), None)
    if isinstance(cache, RaggedCache) or given.get("use_cache") is False:
        return args, given
    if cache is not None and not (type(cache) is DynamicCache and not cache.get_seq_length() and not cache.offloading):
        kind = "cache that offloads" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ModelError(
            f"a {kind} was given to a model that is attached with a budget; only an empty DynamicCache "
            "can be exchanged for a cache with budgets. Begin with a new one, or leave the context"
        )
    own = make()
    if cache is None:
        return args, given | with_cache(model, own)
    exchanged = {name: own if value is cache else value for name, value in given.items()}
    return tuple(own if value is cache else value for value in args), exchanged
