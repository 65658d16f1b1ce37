"""Generating with a cache, also where a conversation goes on.

Stock `generate` takes either the whole conversation or new tokens with a mask over everything; given new tokens alone
it drops as many of them as the cache has seen, without a word. Here new tokens are all that is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attachment import attach
from kvpolicy.integrations.transformers.cache import RaggedCache
from kvpolicy.integrations.transformers.repeat import repeat_context
from kvpolicy.integrations.transformers.versions import CACHE_NAMES, generate_with_cache


def generate(
    model: PreTrainedModel, cache: RaggedCache, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Feeds `input_ids` behind what `cache` has seen, and generates.

    input_ids:      int64 [B, n], new tokens only
    attention_mask: [B, n] of the new tokens; left padding is for the first turn. None: no padding
    options:        of `model.generate`; `tokenizer` is needed where the policy has the context repeated (see
                    `repeat_context`): that is done once, with the first turn's tokens, before an answer begins

    Returns int64 [B, n + generated]: the new tokens and what was generated, as `model.generate` does. The last
    generated token has not been fed yet; the next turn does it.

    Raises `ModelError` for a cache that cannot be continued: after beam search its rows are beams, and rows that
    ended at different times have fillers behind their end. And for one whose context has to be repeated, without a
    tokenizer, or where tokens came before that are not in `input_ids`.
    """
    seen = int(cache.get_seq_length())
    unfed = _unfed(cache, input_ids, seen)
    for name in CACHE_NAMES:
        if name in options:
            raise ModelError(f"kvpolicy.generate takes its cache as the second argument, not as {name}")
    if seen and options.get("prefill_chunk_size"):
        raise ModelError("prefill_chunk_size is for the first prompt: later ones are fed in one piece")
    new = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    fed = torch.cat([unfed, input_ids], 1)
    past = cache.seen_mask().to(input_ids).expand(input_ids.shape[0], -1)
    mask = torch.cat([past, torch.ones_like(unfed), new], 1)
    attach(model)
    if cache.awaits_repeat:
        options = _repeating(model, cache, fed, seen, options)
    try:
        out = model.generate(fed, attention_mask=mask, **generate_with_cache(cache), **options)
    finally:
        cache.stop_recording()
    ids = out if isinstance(out, Tensor) else out.sequences
    _remember(cache, ids, fed.shape[1], seen, _end_tokens(model, options))
    return ids[:, unfed.shape[1] :]


class _RepeatPrompt(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Has the prompt repeated between its own forward, which is dense, and the choice of the first new token.

    That is when generate calls a logits processor first. Beams and samples of a prompt are rows by then.
    """

    def __init__(self, model: PreTrainedModel, cache: RaggedCache, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.cache, self.tokenizer = model, cache, tokenizer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.cache.awaits_repeat:
            mask, positions = self.cache.seen_mask(), self.cache.opened().seen  # generate counts positions by the mask
            repeat_context(
                self.model, self.cache, input_ids, self.tokenizer, attention_mask=mask, next_position=positions
            )
        return scores


def _repeating(
    model: PreTrainedModel, cache: RaggedCache, fed: Tensor, seen: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The options, with the prompt repeated behind its forward. Raises `ModelError` where that cannot be."""
    if seen:
        raise ModelError(
            f"this cache has seen {seen} tokens that nobody has repeated: call kvpolicy.repeat_context(model, cache, "
            "input_ids, tokenizer) with them before the next turn"
        )
    if options.get("tokenizer") is None:
        raise ModelError(
            "this cache's policy has the context repeated, which takes a tokenizer: pass tokenizer= to "
            "kvpolicy.generate, or feed the prompt and call kvpolicy.repeat_context with token ids of your own"
        )
    chunk = options.get("prefill_chunk_size")
    if chunk and fed.shape[1] > 1 and fed.shape[1] % chunk == 1:
        raise ModelError(
            f"prefill_chunk_size={chunk} leaves one token of {fed.shape[1]} alone, which looks like a step of decoding "
            "before the context was repeated: take another size"
        )
    own = _RepeatPrompt(model, cache, options["tokenizer"])
    return options | {"logits_processor": LogitsProcessorList([*(options.get("logits_processor") or ()), own])}


def _unfed(cache: RaggedCache, input_ids: Tensor, seen: int) -> Tensor:
    """Tokens generated in the turn before that the cache has not seen, int64 [B, k]."""
    if not seen:
        return input_ids[:, :0]
    if cache.ended is not None:
        raise ModelError(f"this cache cannot be continued: {cache.ended}")
    if cache.store is not None and cache.store.batch_size != input_ids.shape[0]:
        raise ModelError(f"this cache holds {cache.store.batch_size} sequences, got tokens for {input_ids.shape[0]}")
    return input_ids[:, :0] if cache.unfed is None else cache.unfed.to(input_ids)


def _end_tokens(model: PreTrainedModel, options: dict[str, Any]) -> list[int]:
    """The tokens at which generate ends a row, under these options."""
    config = options.get("generation_config") or model.generation_config
    ends = options.get("eos_token_id", config.eos_token_id)
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def _remember(cache: RaggedCache, ids: Tensor, fed: int, seen: int, ends: list[int]) -> None:
    """Notes what the next turn has to feed first, or why there cannot be one. ids: [rows, fed + generated]."""
    cache.ended = None
    if cache.store is None or cache.store.batch_size != ids.shape[0]:
        cache.ended = "its rows are beams or several samples of one prompt"
        return
    cache.unfed = ids[:, int(cache.get_seq_length()) - seen :].clone()
    ended = torch.isin(ids[:, fed:-1], torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    if ids.shape[0] > 1 and bool(ended.any()):
        cache.ended = "some of its rows ended earlier than others, and fillers stand behind their end"
