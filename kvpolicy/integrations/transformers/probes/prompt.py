"""The loss behind a compressed prompt, under any eviction policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.budget.entry_format import Format, name_of
from kvpolicy.cache.outliving import outliving
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.integrations.transformers.attention.soft_attention import PositionBias
from kvpolicy.integrations.transformers.cache.contexts import attached
from kvpolicy.integrations.transformers.probes.base import SequenceProbe, losses_from
from kvpolicy.integrations.transformers.probes.prefilled import Prompts, prompt_cache
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy
from kvpolicy.text.corpus import Tokenize


class PromptProbe(SequenceProbe):
    """Sequences whose first part is a prompt that is compressed once; what follows it is scored.

    policy:         who evicts
    tokenizer:      the model's, for a policy that has each prompt repeated (`repeat_context`)
    prefill_length: tokens of the prompt, which attend densely; None means half of a sequence. Capacities are the
                    prompt's, and the tokens at positions >= prefill_length are scored
    unscored:       of an answer: tokens behind the prompt that are read and not scored, such as its question
    allocator:      one that splits at run time: a table's total is then split by the scores of each prompt, and the
                    table's own proportions are not used
    kept_bytes:     of the prompts' caches, which are kept from one table to the next; None for 4 GiB
    model, sequences, prompts, tokenize, batch_size, entry_format, shared_layers: as for `TransformersProbe`

    `loss` is that of a cache with `decode="append"`, token by token: what follows the prompt is kept on top of the
    capacities, so that one forward of all of it over the compressed prompt is exact. Under a format it is that of a
    prompt that is encoded once: what follows it, and what was exact behind it, stays exact.

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
        unscored: int | None = None,
        batch_size: int = 1,
        allocator: BudgetAllocator | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        kept_bytes: int | None = None,
        entry_format: Format = None,
        shared_layers: Mapping[int, int] | None = None,
    ) -> None:
        length = int(sequences.shape[1])
        prefill_length = length // 2 if prefill_length is None else prefill_length
        most = length - 2 if unscored is None else length - 1 - unscored
        if not 0 < prefill_length <= most:
            raise BudgetError(
                f"a prompt to compress must have from 1 to {most} of a sequence's {length} tokens, so that some "
                f"are scored behind it; got {prefill_length}"
            )
        super().__init__(
            model,
            sequences,
            prompts,
            tokenize=tokenize,
            num_sink_tokens=plugin_call.admitted(policy).num_sink_tokens,
            prefill_length=prefill_length,
            batch_size=batch_size,
            entry_format=entry_format,
            shared_layers=shared_layers,
        )
        self.policy, self.allocator, self.unscored = policy, allocator, unscored or 0
        batches = torch.split(sequences[:, :prefill_length], batch_size)
        self.contexts = Prompts(
            model,
            batches,
            policy,
            tokenizer,
            kept_bytes=kept_bytes,
            entry_format=entry_format,
            shared_layers=shared_layers,
        )
        self._order: dict[int, Tensor] = {}
        with attached(model):
            prompt_cache(model, policy, self.contexts.whole, allocator, entry_format, shared_layers)

    @property
    def context_length(self) -> int:
        return self.prefill_length

    @property
    def first_scored(self) -> int:
        return self.prefill_length + self.unscored

    @property
    def described(self) -> str:
        behind = self.sequences.shape[1] - self.first_scored
        kept = "" if self.entry_format is None else f" to entries in {name_of(self.entry_format)}"
        return (
            f"a prompt of {self.prefill_length} tokens is compressed once{kept}; the {behind} tokens behind it, "
            'decoded on top of the budget (decode="append"), are scored'
        )

    def _is_exact(self, q_pos: Tensor, kv_pos: Tensor, recent: int) -> Tensor:
        """Of the prompt, what stays exact behind it; and what follows it."""
        sinks = (kv_pos < self.num_sink_tokens) & (recent > 0)
        return (sinks | (kv_pos >= self.prefill_length - recent)).expand(len(q_pos), -1)

    def _ranks(self, sequence: int) -> PositionBias:
        """By the scores that the prompt's entries got with nothing evicted; what follows the prompt is kept."""
        if self.allocator is not None:
            raise PluginError(
                f"soft_loss is that of capacities, and {type(self.allocator).__name__} splits the budget of each "
                "prompt: learn under a policy alone"
            )
        if "capacity" in self.policy.requires:
            raise PluginError(
                f"soft_loss is that of one order of eviction for all capacities, and {type(self.policy).__name__} "
                "requires capacity: its order depends on it"
            )
        if sequence not in self._order:
            self._order[sequence] = self._eviction_ranks(sequence)
        order = self._order[sequence]

        def rank(layer: int, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
            ranks = F.pad(order[layer].long(), (0, 1), value=-1)[:, kv_pos.clamp(max=self.prefill_length)]
            return ranks[:, None].expand(-1, len(q_pos), -1)

        return rank

    def _eviction_ranks(self, sequence: int) -> Tensor:
        """int32 [L, H, prefill_length] on the model's device, of one sequence's prompt."""
        index, row = divmod(sequence, self.batch_size)
        store = self.contexts.compressed(index, self.contexts.whole)[0].opened()
        store.take(torch.tensor([row]))
        layers = [None if layer is None else outliving(layer) for layer in store.layers]
        return torch.stack([ranks.to(self.model.device, torch.int32) for ranks in layers if ranks is not None])

    def filled(self, capacities: Tensor) -> RaggedStore:
        """A store as the first sequence's prompt leaves it. capacities: int `[L, H]`."""
        self._check(capacities)
        store = self.contexts.compressed(0, capacities, self.allocator)[0].opened()
        store.take(torch.zeros(1, dtype=torch.int64))
        return store

    def seconds(self, forward: float) -> float:
        """Timed on one batch with half of its prompt kept, once the prompts that serve all tables have been run, and on
        one of those whose prompt is run again for each table, if there are any.
        """
        batches, once = torch.split(self.sequences, self.batch_size), self.contexts.run()
        again = len(batches) - once
        total = (once * self._batch_seconds(0) if once else 0.0) + (
            again * self._batch_seconds(len(batches) - 1) if again else 0.0
        )
        return total / self.num_sequences

    def _batch_seconds(self, index: int) -> float:
        table = torch.full(self.spec.table_shape, max(self.prefill_length // 2, self.least_capacity))
        ids, start = torch.split(self.sequences, self.batch_size)[index].to(self.model.device), 0.0
        for _ in range(2):  # compiling and setting memory aside is left to the first
            start = time.perf_counter()
            with torch.no_grad():
                self._batch_losses(index, ids, table).cpu()
        return time.perf_counter() - start

    def _batch_losses(self, index: int, ids: Tensor, capacities: Tensor) -> Tensor:
        logits = self.contexts.logits(index, capacities, ids[:, self.prefill_length : -1], self.allocator)
        return losses_from(logits[:, self.unscored :], ids[:, self.first_scored :])
