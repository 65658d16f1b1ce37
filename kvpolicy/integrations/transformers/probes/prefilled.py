"""Prompts that are run once, for caches under as many tables of capacities as are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import Format, is_thin, least_entries
from kvpolicy.cache.lower import lower
from kvpolicy.cache.schedule import ByLength, Fixed
from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.integrations.transformers.cache.build import cache_of
from kvpolicy.integrations.transformers.cache.contexts import attached
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.cache.recipe import Recipe
from kvpolicy.integrations.transformers.cache.repeat import repeat_context
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy

KEPT_BYTES = 4 * 1024**3
"""Of one set of prompts, where nothing else is said."""


class Prompts:
    """Batches of prompts, each run with nothing evicted; every cache made of one is as if it had come first.

    batches:   int64 [B, n] each, where n may differ from one to the next
    policy:    who evicts
    tokenizer: the model's, for a policy that has prompts repeated (`repeat_context`)
    padding:   int64 [B] each, tokens at the start of each row that are padding; None for none
    kept_bytes: of caches that are kept from one table to the next; what is beyond is run again for each; None for 4 GiB
    shared_layers: as for `new_cache`
    entry_format: of the prompts' entries; None for the model's dtype

    Raises `PluginError` for a policy that has prompts repeated where there is no tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        policy: EvictionPolicy,
        tokenizer: PreTrainedTokenizerBase | None = None,
        padding: Sequence[Tensor] | None = None,
        kept_bytes: int | None = None,
        entry_format: Format = None,
        shared_layers: Mapping[int, int] | None = None,
    ) -> None:
        if "repeat_attention" in policy.requires and tokenizer is None:
            raise PluginError(
                f"{type(policy).__name__} requires repeat_attention: prompts are repeated, which takes the model's "
                "tokenizer; give tokenizer="
            )
        for batch in batches:
            check_token_ids(model, batch, "prompts")
        self.model, self.batches, self.policy, self.tokenizer = model, list(batches), policy, tokenizer
        self.padding = [torch.zeros(len(batch), dtype=torch.int64) for batch in batches] if padding is None else padding
        self.kept_bytes = KEPT_BYTES if kept_bytes is None else kept_bytes
        self.entry_format, self.shared_layers = entry_format, dict(shared_layers or {})
        self._kept: dict[int, tuple[RaggedCache, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens of each prompt of the first batch."""
        return int(self.batches[0].shape[1])

    @property
    def whole(self) -> Tensor:
        """Capacities that leave a prompt whole, int64 [L, H]; its entries are scored all the same."""
        return self._capacities(self.length)

    def _capacities(self, length: int) -> Tensor:
        shape = ModelSpec.from_config(self.model.config).sharing(self.shared_layers).table_shape
        return torch.full(shape, max(length, least_entries(self.policy, self.entry_format)))

    @property
    def nbytes(self) -> int:
        """Bytes of the caches that are kept."""
        return sum(cache.nbytes for cache, _ in self._kept.values())

    def run(self) -> int:
        """Runs what is run once for all tables. Returns how many batches of prompts that is."""
        for index in range(len(self.batches)):
            self._whole(index)
            if index not in self._kept:
                break
        return len(self._kept)

    def row_lengths(self, index: int) -> list[int]:
        """Tokens of each prompt of a batch."""
        lengths: list[int] = (self.batches[index].shape[1] - self.padding[index]).tolist()
        return lengths

    def compressed(
        self, index: int, table: Tensor | Callable[[int], Tensor], allocator: BudgetAllocator | None = None
    ) -> tuple[RaggedCache, Tensor]:
        """A cache of batch `index` that keeps what `table` allows, and the logits behind its prompts `[B, 1, vocab]`.
        What follows is kept on top. The cache is to be used while the model is attached.

        table:     int [L, H], entries of the prompt; where prompts differ in length, by the tokens of one
        allocator: splits the table's total at run time by the scores of each prompt instead
        """
        limits, policy = self._limits(index, table), self.policy
        # what these leave is of no use for another table: no scores, those of one capacity, no attention, or channels
        # that the keys of one table have chosen
        is_split_anew = allocator is not None and (policy.window_rule or bool(allocator.requires))
        if is_split_anew or "capacity" in policy.requires or is_thin(self.entry_format):
            return self._run(index, limits, allocator)
        whole, logits = self._whole(index)
        cache = whole.fork()
        lower(cache.opened(), limits, allocator)
        return cache, logits

    def logits(self, index: int, table: Tensor, behind: Tensor, allocator: BudgetAllocator | None = None) -> Tensor:
        """Logits behind the prompts of batch `index` and behind each of `n` further tokens, `[B, 1 + n, vocab]`.

        behind: int64 [B, n] on the model's device; the rest as in `compressed`
        """
        with torch.no_grad(), attached(self.model):
            cache, before = self.compressed(index, table, allocator)
            if behind.shape[1] == 0:
                return before
            cache.hold(behind.shape[1])
            after = self.model(behind, **with_cache(self.model, cache), use_cache=True).logits
            cache.check_enforced()
            return torch.cat([before, after], 1)

    def _limits(self, index: int, table: Tensor | Callable[[int], Tensor]) -> Tensor | ByLength:
        """A table of no more entries than a prompt has, or one for each length."""
        lengths = self.row_lengths(index)
        if isinstance(table, Tensor):
            return table.long().clamp(max=max(lengths))
        tables = {length: table(length).long().clamp(max=length) for length in lengths}
        return ByLength(tables) if len(tables) > 1 else tables[lengths[0]]

    def _whole(self, index: int) -> tuple[RaggedCache, Tensor]:
        """As `compressed`, with nothing evicted: for all tables, so it is left as it is."""
        if index in self._kept:
            return self._kept[index]
        cache, logits = self._run(index, self._capacities(int(self.batches[index].shape[1])), None)
        if cache.nbytes + self.nbytes <= self.kept_bytes:
            self._kept[index] = cache, logits
        return cache, logits

    def _run(
        self, index: int, table: Tensor | ByLength, allocator: BudgetAllocator | None
    ) -> tuple[RaggedCache, Tensor]:
        model, ids = self.model, self.batches[index].to(self.model.device)
        mask, lengths = None, torch.tensor(self.row_lengths(index))
        options: dict[str, Any] = {}
        if bool(self.padding[index].any()):
            mask = (torch.arange(ids.shape[1]) >= self.padding[index][:, None]).long().to(ids.device)
            options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad(), attached(model):
            cache = prompt_cache(model, self.policy, table, allocator, self.entry_format, self.shared_layers)
            options |= with_cache(model, cache) | keep_logits(model)
            logits = model(ids, use_cache=True, **options).logits[:, -1:]
            if cache.awaits_repeat:
                assert self.tokenizer is not None  # asked for at the beginning
                repeat_context(model, cache, ids, self.tokenizer, attention_mask=mask, next_position=lengths)
            cache.check_enforced()
        return cache, logits


def prompt_cache(
    model: PreTrainedModel,
    policy: EvictionPolicy,
    table: Tensor | ByLength,
    allocator: BudgetAllocator | None = None,
    entry_format: Format = None,
    shared_layers: Mapping[int, int] | None = None,
) -> RaggedCache:
    """An empty cache that compresses a prompt once and keeps what follows on top. Attaches the model.

    table:     int64 [L, H], the entries each KV head may keep of the prompt, or one for each length of a prompt
    allocator: splits the table's total by the scores of the prompt instead
    entry_format: of the entries; None for the model's dtype
    shared_layers: as for `new_cache`; the table is that of the other layers

    Raises `BudgetError` for an allocator that does not split at run time: its shares make a table.
    """
    if allocator is not None and allocator.split_scope == "none":
        raise BudgetError(f"{type(allocator).__name__} does not split at run time: make a table of its shares")
    recipe = Recipe(
        policy=policy,
        allocator=allocator,
        plan=None,
        ask=Ask(),
        protected=(),
        decode="append",
        rollback=0,
        entry_format=entry_format,
        shared_layers=dict(shared_layers or {}),
    )
    return cache_of(model, recipe, table if isinstance(table, ByLength) else Fixed(table))
