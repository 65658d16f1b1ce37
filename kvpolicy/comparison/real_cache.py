"""One real cache behind its prompts: what a row is weighed and timed on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvpolicy.comparison.methods import Method
from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers import (
    RaggedCache,
    attached,
    cache_nbytes,
    detached,
    prompt_cache,
    quantized_cache,
    repeat_context,
    with_cache,
)
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.probes.decode_cost import seconds_now
from kvpolicy.measure.evaluation import CacheBytes
from kvpolicy.model.spec import ModelSpec

WARM_TOKENS, TIMED_TOKENS = 3, 16


@contextmanager
def ready(model: Any, method: Method) -> Iterator[None]:
    """The model as the caches of a method need it, without gradients; afterwards it is as it was before."""
    with torch.no_grad(), detached(model) if method.quantized else attached(model):
        yield


def filled_cache(model: Any, method: Method, table: Tensor, ids: Tensor, tokenizer: Any = None) -> tuple[Any, Tensor]:
    """A cache that has compressed these prompts to a table of capacities, and the logits behind each, `[B, 1, vocab]`.
    What follows is kept on top. To be called, and used, while the model is `ready`.

    ids: int64 `[B, T]`;  tokenizer: for a policy that has its context repeated
    """
    if method.quantized:
        cache = quantized_cache(model, method.quantized)
    else:
        options = method.runtime_allocator, method.entry_format, method.shared_layers
        cache = prompt_cache(model, method.policy, table, *options)
    ids = ids.to(model.device)
    logits = model(ids, **with_cache(model, cache), use_cache=True, **keep_logits(model)).logits[:, -1:]
    if isinstance(cache, RaggedCache):
        if cache.awaits_repeat:
            repeat_context(model, cache, ids, tokenizer)
        cache.check_enforced()
    return cache, logits


def weighed(cache: Any, table: Tensor, spec: ModelSpec, dtype: torch.dtype) -> CacheBytes:
    """The mean row's bytes of a filled cache. spec: the whole model's;  dtype: of entries that are not quantized.

    Raises `BudgetError` if a row does not hold as much as the table says.
    """
    rows = cache.opened().batch_size if isinstance(cache, RaggedCache) else 1
    return weighed_rows(cache, [table] * rows, spec, dtype)[0]


def weighed_rows(cache: Any, tables: Sequence[Tensor], spec: ModelSpec, dtype: torch.dtype) -> list[CacheBytes]:
    """The same for each row, with its own entries and the mean row's bytes. tables: of each row"""
    entries = [int(table.sum()) for table in tables]
    if not isinstance(cache, RaggedCache):  # quantized: of one row
        return [CacheBytes(cache_nbytes(cache), entries[0] * spec.entry_bytes(dtype.itemsize), entries[0])]
    store = cache.opened()
    lengths, rows = store.lengths.sum((0, 2)).tolist(), store.batch_size
    if lengths != entries:
        says = f"the table says {entries[0]}" if len(set(entries)) == 1 else f"their tables say {entries}"
        raise BudgetError(f"the cache holds {lengths} entries in its rows, {says}")
    dense = store.dense_nbytes // rows // store.spec.num_budgeted_layers * spec.num_budgeted_layers
    return [CacheBytes(store.nbytes // rows, dense, count) for count in entries]


def decode_ms(model: Any, method: Method, table: Tensor, prompt: Tensor, tokenizer: Any = None) -> float:
    """Milliseconds of one token decoded behind a prompt: the median of 16 calls of the model with one token and its
    cache, after 3 that are not counted. It is the plain loop, nothing is compiled.

    prompt: int64 `[1, T]`
    """
    seconds = []
    with ready(model, method):
        cache, logits = filled_cache(model, method, table, prompt, tokenizer)
        token = logits.argmax(-1)
        for _ in range(WARM_TOKENS + TIMED_TOKENS):
            begun = seconds_now(token)
            model(token, **with_cache(model, cache), use_cache=True)
            seconds.append(seconds_now(token) - begun)
    return 1e3 * statistics.median(seconds[WARM_TOKENS:])
