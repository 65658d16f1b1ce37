"""The loss behind a compressed prompt, under any eviction policy."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.cache.lower import lower
from kvpolicy.cache.schedule import MIN_TOKENS, Fixed
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.integrations.transformers.biased import PositionBias
from kvpolicy.integrations.transformers.build import cache_of
from kvpolicy.integrations.transformers.cache import RaggedCache
from kvpolicy.integrations.transformers.probe import TransformersProbe, losses_from
from kvpolicy.integrations.transformers.recipe import Recipe
from kvpolicy.integrations.transformers.repeat import repeat_context
from kvpolicy.integrations.transformers.supply import attached
from kvpolicy.interfaces import BudgetAllocator, EvictionPolicy
from kvpolicy.text import Tokenize

KEPT_BYTES = 2 * 1024**3
"""Caches of prompts that a probe keeps from one table to the next; what is beyond is run again for each."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    """A batch of prompts that was run.

    next_loss: float32 [B, 1], of the token behind the prompt
    """

    cache: RaggedCache
    next_loss: Tensor


class PromptProbe(TransformersProbe):
    """Sequences whose first part is a prompt that is compressed once; what follows it is scored.

    policy:         who evicts
    tokenizer:      the model's, for a policy that has each prompt repeated (`repeat_context`)
    prefill_length: tokens of the prompt, which attend densely; None means half of a sequence. Capacities are the
                    prompt's, and the tokens at positions >= prefill_length are scored
    allocator:      one that splits at run time: a table's total is then split by the scores of each prompt, and the
                    table's own proportions are not used
    model, sequences, prompts, tokenize, batch_size: as for `TransformersProbe`

    `loss` is that of a cache with `decode="append"`, token by token: what follows the prompt is kept on top of the
    capacities, so that one forward of all of it over the compressed prompt is exact.

    Raises `BudgetError` for a prompt that leaves nothing to be scored behind it and for an allocator that splits
    nothing at run time, `PluginError` for a policy that requires `repeat_attention`, and what `new_cache` raises for a
    model or a policy that cannot be; all of it before anything runs.
    """

    protocol: ClassVar[str] = "prompt"

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        prompts: Sequence[Tensor] = (),
        *,
        policy: EvictionPolicy,
        tokenize: Tokenize | None = None,
        prefill_length: int | None = None,
        batch_size: int = 1,
        allocator: BudgetAllocator | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if "repeat_attention" in policy.requires and tokenizer is None:
            raise PluginError(
                f"{type(policy).__name__} requires repeat_attention: prompts are repeated, which takes the model's "
                "tokenizer. Make the probe with PromptProbe(..., tokenizer=tokenizer)"
            )
        length = int(sequences.shape[1])
        prefill_length = length // 2 if prefill_length is None else prefill_length
        if not 0 < prefill_length < length - 1:
            raise BudgetError(
                f"a prompt to compress must have from 1 to {length - 2} of a sequence's {length} tokens, so that some "
                f"are scored behind it; got {prefill_length}"
            )
        super().__init__(
            model,
            sequences,
            prompts,
            tokenize=tokenize,
            num_sink_tokens=policy.num_sink_tokens,
            prefill_length=prefill_length,
            batch_size=batch_size,
        )
        self.policy, self.allocator, self.tokenizer = policy, allocator, tokenizer
        self._kept: dict[int, _Prompt] = {}
        self._order: dict[int, Tensor] = {}
        with attached(model):
            prompt_cache(model, policy, self._whole, allocator)

    @property
    def context_length(self) -> int:
        return self.prefill_length

    @property
    def first_scored(self) -> int:
        return self.prefill_length

    @property
    def described(self) -> str:
        behind = self.sequences.shape[1] - self.prefill_length
        return (
            f"a prompt of {self.prefill_length} tokens is compressed once; the {behind} tokens behind it, decoded on "
            'top of the budget (decode="append"), are scored'
        )

    def _ranks(self, sequence: int) -> PositionBias:
        """By the scores that the prompt's entries got with nothing evicted; what follows the prompt is kept."""
        if self.allocator is not None:
            raise PluginError(
                f"soft_loss is that of capacities, and {type(self.allocator).__name__} splits the budget of each "
                "prompt: learn under a policy alone"
            )
        if sequence not in self._order:
            self._order[sequence] = self._eviction_ranks(sequence)
        order = self._order[sequence]

        def rank(layer: int, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
            found = F.pad(order[layer].long(), (0, 1), value=-1)[:, kv_pos.clamp(max=self.prefill_length)]
            return found[:, None].expand(-1, len(q_pos), -1)

        return rank

    def _eviction_ranks(self, sequence: int) -> Tensor:
        """int32 [L, H, prefill_length] on the model's device, of one sequence's prompt."""
        index, row = divmod(sequence, self.batch_size)
        ids = torch.split(self.sequences, self.batch_size)[index].to(self.model.device)
        with torch.no_grad(), attached(self.model):
            store = self._compressed(index, ids, self._whole).cache.opened()
        store.take(torch.tensor([row]))
        layers = [None if held is None else held.outliving() for held in store.layers]
        return torch.stack([ranks.to(self.model.device, torch.int32) for ranks in layers if ranks is not None])

    def token_losses(self, capacities: Tensor) -> Iterator[Tensor]:
        self._check(capacities)
        for index, batch in enumerate(torch.split(self.sequences, self.batch_size)):
            ids = batch.to(self.model.device)
            with torch.no_grad(), attached(self.model):
                prompt = self._compressed(index, ids, capacities)
                cache = prompt.cache
                # all of it may still be taken back, so nothing of it is scored or evicted: decode="append"
                cache.recording, cache.rollback = True, ids.shape[1]
                logits = self.model(ids[:, self.prefill_length : -1], past_key_values=cache, use_cache=True).logits
                cache.check_enforced()
                losses = losses_from(logits, ids[:, self.prefill_length + 1 :])
            yield torch.cat([prompt.next_loss, losses], 1).cpu()

    def filled(self, capacities: Tensor) -> RaggedStore:
        """A store as the first sequence's prompt leaves it. capacities: int `[L, H]`."""
        self._check(capacities)
        with torch.no_grad(), attached(self.model):
            ids = self.sequences[: self.batch_size].to(self.model.device)
            store = self._compressed(0, ids, capacities).cache.opened()
        store.take(torch.zeros(1, dtype=torch.int64))
        return store

    def seconds(self) -> float:
        """What a sequence takes with half of its prompt kept, once the prompts that can be kept have been run."""
        table = torch.full(self.spec.table_shape, max(self.prefill_length // 2, self.num_sink_tokens + 1))
        for _ in range(2):
            begun = time.perf_counter()
            self.loss(table)
        return (time.perf_counter() - begun) / len(self.sequences)

    @property
    def _whole(self) -> Tensor:
        """Capacities that leave a prompt whole; its entries are scored all the same."""
        return torch.full(self.spec.table_shape, max(self.prefill_length, self.num_sink_tokens + 1))

    def _compressed(self, index: int, ids: Tensor, capacities: Tensor) -> _Prompt:
        """The prompts of batch `index`, of which what `capacities` allow is kept. ids: int64 [B, T]."""
        table = capacities.long().clamp(max=self.prefill_length)
        if self.allocator is not None:
            return self._run(ids, table)
        prompt = self._kept.get(index)
        if prompt is None:
            prompt = self._run(ids, self._whole)
            if prompt.cache.nbytes + sum(each.cache.nbytes for each in self._kept.values()) <= KEPT_BYTES:
                self._kept[index] = prompt
        cache = copy.deepcopy(prompt.cache)
        lower(cache.opened(), table)
        return _Prompt(cache, prompt.next_loss)

    def _run(self, ids: Tensor, table: Tensor) -> _Prompt:
        """Runs the prompts of a batch under these capacities."""
        cache, length = prompt_cache(self.model, self.policy, table, self.allocator), self.prefill_length
        logits = self.model(ids[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if cache.awaits_repeat:
            assert self.tokenizer is not None  # asked for at the beginning
            repeat_context(self.model, cache, ids[:, :length], self.tokenizer)
        return _Prompt(cache, losses_from(logits[:, -1:], ids[:, length : length + 1]))


def prompt_cache(
    model: PreTrainedModel, policy: EvictionPolicy, table: Tensor, allocator: BudgetAllocator | None = None
) -> RaggedCache:
    """An empty cache that compresses a prompt once and keeps what follows on top. Attaches the model.

    table:     int64 [L, H], the entries each KV head may keep of the prompt
    allocator: splits the table's total by the scores of the prompt instead

    Raises `BudgetError` for an allocator that does not split at run time: its shares make a table.
    """
    if allocator is not None and allocator.split_scope == "none":
        raise BudgetError(f"{type(allocator).__name__} does not split at run time: make a table of its shares")
    recipe = Recipe(
        policy=policy,
        allocator=allocator,
        plan=None,
        retention=None,
        tokens=None,
        context_length=None,
        min_tokens=MIN_TOKENS,
        protected=(),
        decode="append",
        rollback=0,
    )
    return cache_of(model, recipe, Fixed(table))
