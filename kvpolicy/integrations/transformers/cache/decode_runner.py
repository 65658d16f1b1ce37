"""Decoding token by token, for custom loops."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.cache.device_tables import on_device
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.attachment import attach
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.integrations.transformers.model.wrappers import unwrapped
from kvpolicy.model.spec import ModelSpec


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row. logits: [B, vocabulary]. Returns int64 [B]."""
    return logits.argmax(-1)


class DecodeRunner:
    """Runs a model over a cache, prompt after prompt, and token by token behind each.

        cache = kvpolicy.new_cache(model, plan, retention=0.3)
        runner = kvpolicy.DecodeRunner(model, cache)
        logits = runner.prefill(prompt)        # as often as there are prompts
        logits = runner.step(logits.argmax(-1))

    On a GPU a token is one replay of a CUDA graph, here as in `model.generate` and in every loop over the model.

    model, cache: a cache of `new_cache(model, ...)`, which the runner has to itself
    compiled: whether `torch.compile` fuses the model's small operations before they are recorded. It takes a minute for
        a large model, and a token a third less

    Raises `ModelError` for a cache that another kind of model was given.
    """

    def __init__(self, model: PreTrainedModel, cache: RaggedCache, *, compiled: bool = False) -> None:
        self.model, self.cache = unwrapped(model), cache
        if ModelSpec.from_config(self.model.config).sharing(cache.recipe.shared_layers) != cache.spec:
            raise ModelError(
                "the cache was made for a model of other layers or heads: new_cache(model, ...) with the model that "
                "the runner is for"
            )
        if compiled:
            cache.replays.compile(types.MethodType(type(self.model).forward, self.model))
        # the store of the prompt that came from here, which is free as soon as the cache drops it
        self._prompt: weakref.ref[RaggedStore] | None = None

    @property
    def mode(self) -> Literal["graph", "eager"] | None:
        """How the last token was decoded; None before the first one behind a prompt."""
        return self.cache.replays.mode

    @property
    def why(self) -> str | None:
        """Why the last token was decoded without a graph."""
        return self.cache.replays.why

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Forgets what was there and reads a prompt. input_ids: int64 [B, n]; attention_mask: [B, n], for left padding.

        Returns the logits of the last token, [B, vocabulary]. Raises `ModelError` for other shapes, and for a mask that
        hides anything but the first tokens of a row.
        """
        check_token_ids(self.model, input_ids)
        mask = _checked(input_ids, attention_mask)
        attach(self.model)
        self.cache.reset()
        # a model counts positions from the first column, padding or not; only generate counts them by the mask
        position_ids = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0).to(self.model.device)
        out = self.model(
            input_ids.to(self.model.device),
            attention_mask=None if mask is None else mask.to(self.model.device),
            position_ids=position_ids,
            **with_cache(self.model, self.cache),
            use_cache=True,
            **keep_logits(self.model),
        )
        self._prompt = weakref.ref(self.cache.opened())
        logits: Tensor = out.logits[:, -1]
        return logits

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Feeds one token a row. token_ids: int64 [B] or [B, 1].

        Returns its logits, [B, vocabulary]. Raises `ModelError` before a prompt, for another number of tokens, and
        where a step broke off or another prompt came into the cache.
        """
        store = self.cache.opened()
        if self._prompt is None or store is not self._prompt():
            raise ModelError("the cache holds a prompt that did not come from this runner: prefill() first")
        if token_ids.numel() != store.batch_size:
            raise ModelError(f"a step takes one token for each of {store.batch_size} rows, got {list(token_ids.shape)}")
        ids = token_ids.reshape(-1, 1).to(self.model.device)
        positions = on_device(store.seen[:, None], self.model.device)
        out = self.model(ids, position_ids=positions, **with_cache(self.model, self.cache), use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        select: Callable[[Tensor], Tensor] = greedy,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Tensor:
        """A prompt and what follows it. input_ids: int64 [B, n].

        select: logits [B, vocabulary] to tokens int64 [B]
        eos_token_id: ends a row; it, or the first of several, is repeated behind the end until all rows have ended

        Returns int64 [B, n + generated].
        """
        logits, ids = self.prefill(input_ids, attention_mask), [input_ids.to(self.model.device)]
        ends = [] if eos_token_id is None else torch.tensor(eos_token_id).flatten().tolist()
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=self.model.device)
        for left in range(max_new_tokens, 0, -1):
            token = select(logits)
            if ends:
                token = token.masked_fill(ended, ends[0])
                ended = ended | torch.isin(token, torch.tensor(ends, device=token.device))
            ids.append(token[:, None])
            if left == 1 or (ends and bool(ended.all())):
                break
            logits = self.step(token)
        return torch.cat(ids, 1)


def _checked(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask of a prompt, None where nothing is hidden. Raises `ModelError` for one that `prefill` cannot take."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ModelError(
            f"attention_mask must have the prompt's shape, {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    shown = attention_mask.bool()
    if not bool(shown[:, -1].all()) or bool((shown[:, 1:] < shown[:, :-1]).any()):
        raise ModelError(
            "attention_mask hides tokens behind a row's first one: the runner takes padding on the left alone, set "
            "tokenizer.padding_side = 'left'"
        )
    return None if bool(shown.all()) else attention_mask
