"""The loss behind a compressed prompt, under any eviction policy."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.cache.lower import lower
from kvpolicy.cache.schedule import MIN_TOKENS, Fixed
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.integrations.transformers.build import cache_of
from kvpolicy.integrations.transformers.cache import RaggedCache
from kvpolicy.integrations.transformers.probe import TransformersProbe, losses_from
from kvpolicy.integrations.transformers.recipe import Recipe
from kvpolicy.integrations.transformers.supply import attached
from kvpolicy.interfaces import EvictionPolicy
from kvpolicy.text import Tokenize

KEPT_BYTES = 2 * 1024**3
"""Caches of prompts that a probe keeps from one table to the next; what is beyond is run again for each."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    """A batch of prompts that was run: nothing evicted, everything scored.

    next_loss: float32 [B, 1], of the token behind the prompt
    """

    cache: RaggedCache
    next_loss: Tensor


class PromptProbe(TransformersProbe):
    """Sequences whose first part is a prompt that is compressed once; what follows it is scored.

    policy:         who evicts, any policy that does not have the context repeated
    prefill_length: tokens of the prompt, which attend densely; None means half of a sequence. Capacities are the
                    prompt's, and the tokens at positions >= prefill_length are scored
    model, sequences, prompts, tokenize, batch_size: as for `TransformersProbe`

    `loss` is that of a cache with `decode="append"`, token by token: what follows the prompt is kept on top of the
    capacities, so that one forward of all of it over the compressed prompt is exact.

    Raises `BudgetError` for a prompt that leaves nothing to be scored behind it, `PluginError` for a policy that
    requires `repeat_attention`, and what `new_cache` raises for a model or a policy that cannot be; all of it before
    anything runs.
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
    ) -> None:
        if "repeat_attention" in policy.requires:
            raise PluginError(
                f"{type(policy).__name__} requires repeat_attention: no context is repeated while losses are measured, "
                "so neither tune nor eval can run under it. Tune and evaluate under another policy; a cache takes this "
                "one with any plan"
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
        self.policy = policy
        self._kept: dict[int, _Prompt] = {}
        with attached(model):
            self._new_cache()

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

    def token_losses(self, capacities: Tensor) -> Iterator[Tensor]:
        self._check(capacities)
        for index, batch in enumerate(torch.split(self.sequences, self.batch_size)):
            ids = batch.to(self.model.device)
            with torch.no_grad(), attached(self.model):
                prompt = self._prompt(index, ids)
                cache = self._compressed(prompt, capacities)
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
            prompt = self._prompt(0, self.sequences[: self.batch_size].to(self.model.device))
            store = self._compressed(prompt, capacities).opened()
        store.take(torch.zeros(1, dtype=torch.int64))
        return store

    def seconds(self) -> float:
        """What a sequence takes with half of its prompt kept, once the prompts that can be kept have been run."""
        table = torch.full(self.spec.table_shape, max(self.prefill_length // 2, self.num_sink_tokens + 1))
        for _ in range(2):
            begun = time.perf_counter()
            self.loss(table)
        return (time.perf_counter() - begun) / len(self.sequences)

    def _prompt(self, index: int, ids: Tensor) -> _Prompt:
        """The prompts of batch `index`, run now or before. ids: int64 [B, T]."""
        if (kept := self._kept.get(index)) is not None:
            return kept
        cache, length = self._new_cache(), self.prefill_length
        logits = self.model(ids[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        prompt = _Prompt(cache, losses_from(logits[:, -1:], ids[:, length : length + 1]))
        if cache.nbytes + sum(each.cache.nbytes for each in self._kept.values()) <= KEPT_BYTES:
            self._kept[index] = prompt
        return prompt

    def _compressed(self, prompt: _Prompt, capacities: Tensor) -> RaggedCache:
        """A copy of the prompt's cache that keeps what `capacities` allow."""
        cache = copy.deepcopy(prompt.cache)
        lower(cache.opened(), capacities.long().clamp(max=self.prefill_length))
        return cache

    def _new_cache(self) -> RaggedCache:
        """An empty cache with room for the whole prompt, whose entries are scored all the same."""
        recipe = Recipe(
            policy=self.policy,
            allocator=None,
            plan=None,
            retention=None,
            tokens=None,
            context_length=None,
            min_tokens=MIN_TOKENS,
            protected=(),
            decode="append",
            rollback=0,
        )
        room = max(self.prefill_length, self.num_sink_tokens + 1)
        return cache_of(self.model, recipe, Fixed(torch.full(self.spec.table_shape, room)))
