"""Attaching for the length of a context, and supplying caches to code that makes its own (pipelines, third parties)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.attachment import attach, detach, hold, is_attached, release
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.tracing import untraced
from kvpolicy.integrations.transformers.cache.build import new_cache
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.integrations.transformers.model.wrappers import unwrapped


@contextmanager
def attached(model: PreTrainedModel, plan: BudgetPlan | None = None, **options: Any) -> Iterator[None]:
    """Within the context the model runs over caches of kvpolicy; afterwards it is as it was before.

    plan, options: as in `new_cache`. If any is given, every forward that begins with an empty stock cache, or with
        none, gets a new cache of kvpolicy instead. A forward under a cache that cannot be exchanged raises
        `ModelError`, and so does one without a cache: a budget is never silently missing. Assisted generation needs a
        cache of its own (`generate(model, new_cache(...), ids, ...)`): it announces itself to the cache before the
        first forward. Where contexts overlap, the newest of a thread supplies its forwards; a thread without one gets
        those of the newest of all.

    Raises what `new_cache` raises, before the context begins.
    """
    model = unwrapped(model)
    hold(model)
    handles: list[Any] = []
    try:
        if plan is not None or options:
            first = new_cache(model, plan, **options)  # refuses here what it would refuse in the first forward
            if first.repeats:
                raise ModelError(
                    "this policy requires repeat_attention: the context is repeated behind the prompt, and code that "
                    "makes its own cache does not do that. Give kvpolicy.generate a cache with this policy instead"
                )
            # one layer tells for all of them: a forward gives every layer the same cache
            ((attention, _),) = attention_modules(model, first.spec.budgeted_layers[:1])
            supply = _Supply(model.get_decoder(), lambda: new_cache(model, plan, **options))
            handles += [supply, supply.decoder.register_forward_pre_hook(supply, with_kwargs=True)]
            handles.append(attention.register_forward_pre_hook(_prove, with_kwargs=True))
        yield
    finally:
        for handle in handles:
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


class _Supply:
    """Before a forward: a cache of ours where a stock one would begin, whatever its argument is called."""

    def __init__(self, decoder: nn.Module, make: Callable[[], RaggedCache]) -> None:
        self.decoder, self.make, self.thread = decoder, make, threading.get_ident()
        self.exchanged: WeakSet[Cache] = WeakSet()
        _ACTIVE.append(self)

    def remove(self) -> None:
        """Supplies nothing any more."""
        _ACTIVE.remove(self)

    def is_meant(self) -> bool:
        """Whether this one supplies the forward that runs now in this thread, and not another of the same model."""
        # a copy: contexts of other threads begin and end meanwhile
        here = [supply for supply in tuple(_ACTIVE) if supply.decoder is self.decoder]
        own = [supply for supply in here if supply.thread == threading.get_ident()]
        return (own or here)[-1:] == [self]

    @untraced
    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = _cache_in(args, kwargs)
        if isinstance(cache, RaggedCache) or not self.is_meant():
            return args, kwargs
        if kwargs.get("use_cache") is False:
            raise ModelError(
                "use_cache=False was given to a model that is attached with a budget: without a cache there is none. "
                "Leave it out (generation_config.use_cache too), or leave the context"
            )
        if cache is None:
            return args, kwargs | with_cache(decoder, self.make())
        self._check(cache)
        own = self.make()
        self.exchanged.add(cache)  # its owner may feed it again, and would begin a second time without the text
        exchanged = {name: own if value is cache else value for name, value in kwargs.items()}
        return tuple(own if value is cache else value for value in args), exchanged

    def _check(self, cache: Cache) -> None:
        """Raises `ModelError` for a cache that cannot be exchanged."""
        if cache in self.exchanged:
            raise ModelError(
                "a cache came again that was exchanged for one with a budget: go on with the cache that the model "
                "returns, or begin with kvpolicy.new_cache(...)"
            )
        offloads = getattr(cache, "offloading", False)
        if type(cache) is not DynamicCache or cache.get_seq_length() or offloads:
            raise ModelError(
                f"a {'cache that offloads' if offloads else type(cache).__name__} was given to a model that is "
                "attached with a budget; only an empty DynamicCache can be exchanged for a cache with budgets. Begin "
                "with a new one (generation_config.cache_implementation says otherwise?), or leave the context"
            )


_ACTIVE: list[_Supply] = []  # of all contexts that have begun and not ended, the newest last


def _prove(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the attention of a budgeted layer: raises `ModelError` where it would run without a budget."""
    cache = _cache_in(args, kwargs)
    if not isinstance(cache, RaggedCache):
        came = "no cache" if cache is None else f"a {type(cache).__name__}"
        why = ": gradient checkpointing drops it while training, call model.eval()" if attention.training else ""
        raise ModelError(f"this model is attached with a budget, but {came} reached its attention{why}")


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
