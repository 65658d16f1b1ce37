"""Sequences that join and leave while others decode, over one recorded step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.budget.entry_format import is_centred
from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.schedule import UNLIMITED, Fixed
from kvpolicy.cache.slot_store import SlotStore
from kvpolicy.errors import BudgetError, ModelError
from kvpolicy.integrations.transformers.attention.key_centre import key_centres
from kvpolicy.integrations.transformers.attention.row_rotation import long_rotations, rows_alone
from kvpolicy.integrations.transformers.attention.sources import RUN_SOURCES
from kvpolicy.integrations.transformers.cache.build import cache_of, schedule_of
from kvpolicy.integrations.transformers.cache.decode_runner import greedy
from kvpolicy.integrations.transformers.cache.layer_state import LayerState
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.cache.recipe import Recipe
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.integrations.transformers.model.wrappers import unwrapped


@dataclass(slots=True, eq=False)
class _Sequence:
    """prompt: int64 [1, n];  capacities: int64 [L, H];  left: tokens that it may still be given"""

    prompt: Tensor
    capacities: Tensor
    left: int
    slot: int | None = None

    def sit(self, slot: int) -> None:
        """Is decoded in this slot from now on."""
        self.slot = slot

    def is_last(self) -> bool:
        """Counts a token that it is given. Whether it was the last one."""
        self.left -= 1
        return not self.left


class SlotRunner:
    """Decodes sequences that join and leave while others go on, all of them in one step, on a GPU one recorded step.

        runner = kvpolicy.SlotRunner(model, kvpolicy.new_cache(model, plan, retention=0.2), slots=64, tokens=8192)
        number = runner.admit(prompt, max_new_tokens=256)      # waits for its turn where all slots are taken
        while runner.running or runner.waiting:
            for number, token in runner.step().items(): ...

    cache:  an empty one of `new_cache`: each sequence gets the budget and the format that it describes
    slots:  sequences that are decoded at once
    tokens: of one sequence, prompt and answer; memory is set aside for `slots` sequences of so many
    select: logits [B, vocabulary] to tokens int64 [B]

    Each sequence is given the tokens that it is given alone, whatever the others do. Its capacities are those that its
    budget has once the longest answer is there, from its prompt on, so that its room is known when it is seated.

    Raises `BudgetError` and `ModelError` for what slots cannot serve: policies that rescore while they decode or have
    the context repeated, allocators that split at run time, protected spans, decode="append", layers other than full
    attention and sliding windows, keys turned by the longest text so far (rope_type "dynamic").
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RaggedCache,
        *,
        slots: int,
        tokens: int,
        select: Callable[[Tensor], Tensor] = greedy,
    ) -> None:
        if slots < 1 or tokens < 1:
            raise BudgetError(f"slots and tokens must be at least 1, got {slots} and {tokens}")
        model, recipe = unwrapped(model), cache.recipe
        _check(recipe, cache)
        self.model, self.recipe, self.select = model, recipe, select
        self._schedule = schedule_of(recipe, cache.spec).with_floor(recipe.least_entries)
        self.store = SlotStore(
            cache.spec,
            recipe.policy,
            slots=slots,
            rows=[slots * rows for rows in self._capacities(tokens).sum(1).tolist()],
            device=model.device,
            dtype=model.dtype,
            supplied=RUN_SOURCES,
            entry_format=recipe.entry_format,
            key_centres=key_centres(model, cache.spec) if is_centred(recipe.entry_format) else None,
        )
        self.cache = cache_of(model, recipe)
        self.cache.resume(self.store, LayerState(columns=1), recording=False, unfed=None, ended=None)
        self.cache.furnish(slots, model.dtype, model.device)
        self._limit, self._rotations = cache.dropped_at, long_rotations(model)
        self._tokens = torch.zeros(slots, 1, dtype=torch.int64, device=model.device)
        self._free = list(range(slots))
        self._waiting: deque[int] = deque()
        self._sequences: dict[int, _Sequence] = {}
        self._last = -1

    def admit(self, prompt: Tensor, max_new_tokens: int) -> int:
        """A sequence joins as soon as there is room. prompt: int64 [n] or [1, n]. Returns its number.

        Raises `BudgetError` for one that there is never room for, `ModelError` for one that would pass the length from
        which on the model turns its keys in another way.
        """
        prompt = prompt.reshape(1, -1)
        check_token_ids(self.model, prompt)
        if max_new_tokens < 1:
            raise ModelError(f"a sequence needs at least one token to come, got max_new_tokens={max_new_tokens}")
        seen = prompt.numel() + max_new_tokens - 1  # the last one is not fed
        if self._limit is not None and prompt.numel() <= self._limit < seen:
            raise ModelError(
                f"this model turns its keys in another way beyond {self._limit} tokens (longrope), so no sequence can "
                f"pass that on its way: {prompt.numel()} + {max_new_tokens} tokens were asked for. Ask for "
                f"{self._limit + 1 - prompt.numel()} at most, or begin with a longer prompt"
            )
        capacities = self._capacities(prompt.numel() + max_new_tokens)
        if not self.store.could_ever(capacities):
            raise BudgetError(
                f"a sequence of {prompt.numel()} + {max_new_tokens} tokens keeps {int(capacities.sum())} entries, more "
                "than all slots together have: make the runner with more tokens="
            )
        self._last += 1
        self._sequences[self._last] = _Sequence(prompt.to(self.model.device), capacities, max_new_tokens)
        self._waiting.append(self._last)
        return self._last

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """One more token of every sequence that is seated, then the first of those for which there is room now.

        A sequence that has been given all its tokens leaves. Returns the tokens, by the numbers of the sequences.
        """
        out = self._decode()
        while self._waiting and self._free and self.store.has_room(self._sequences[self._waiting[0]].capacities):
            number = self._waiting.popleft()
            out[number] = self._seat(number)
        return out

    def release(self, number: int) -> None:
        """A sequence leaves, or is not waited for any more. Raises `ModelError` for one that is not there."""
        sequence = self._sequences.pop(number, None)
        if sequence is None:
            raise ModelError(f"sequence {number} is not there: it has ended, or was never admitted")
        if sequence.slot is None:
            self._waiting.remove(number)
        else:
            self.store.vacate(sequence.slot)
            self._free.append(sequence.slot)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Sequences for which there was no room yet, in their order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[int, ...]:
        """Sequences that are seated."""
        return tuple(number for number, sequence in self._sequences.items() if sequence.slot is not None)

    def _capacities(self, tokens: int) -> Tensor:
        """int64 [L, H], of a sequence that is so long at its end."""
        table = self._schedule.at(tokens, None)
        return table.where(table < UNLIMITED, tokens)

    def _decode(self) -> dict[int, int]:
        running = self.running
        if not running:
            return {}
        positions = on_device(self.store.seen[:, None], self.model.device)
        with rows_alone(self._rotations):
            out = self.model(self._tokens, position_ids=positions, **with_cache(self.model, self.cache), use_cache=True)
        tokens = self.select(out.logits[:, -1])
        self._tokens.copy_(tokens[:, None])
        values, found = tokens.tolist(), {}
        for number in running:
            sequence = self._sequences[number]
            assert sequence.slot is not None  # it runs
            found[number] = values[sequence.slot]
            if sequence.is_last():
                self.release(number)
        return found

    def _seat(self, number: int) -> int:
        sequence = self._sequences[number]
        own = cache_of(self.model, self.recipe, Fixed(sequence.capacities))
        out = self.model(sequence.prompt, **with_cache(self.model, own), use_cache=True, **keep_logits(self.model))
        token = self.select(out.logits[:, -1])
        slot = self._free.pop()
        sequence.sit(slot)
        self.cache.seat_rings(slot, own)
        self.store.seat(slot, sequence.capacities, own.opened())
        self._tokens[slot] = token
        if sequence.is_last():
            self.release(number)
        return int(token)


def _check(recipe: Recipe, cache: RaggedCache) -> None:
    if recipe.splitter is not None:
        raise BudgetError(
            f"{type(recipe.splitter).__name__} splits the budget at run time, so that nobody knows how much room a "
            "sequence needs before its prompt: take a plan, or an allocator with fixed shares"
        )
    if recipe.protected or recipe.decode != "evict":
        raise BudgetError("slots hold capacities that are known beforehand: leave protected= and decode= out")
    if cache.repeats:
        raise BudgetError(
            f"{type(recipe.policy).__name__} has the context repeated, which slots do not: take another policy"
        )
    if cache.other_kinds:
        kinds = ", ".join(cache.other_kinds)
        raise ModelError(f"this model has layers of other kinds ({kinds}), whose caches slots cannot hold")
