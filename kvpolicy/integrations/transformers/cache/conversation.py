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
from kvpolicy.integrations.transformers.attention.attachment import attach
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.cache.repeat import repeat_context
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.model.versions import CACHE_NAMES, generate_with_cache


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

    Raises `ModelError` for tokens of another shape, none at all, or ones that the model does not know. For a cache that
    cannot be continued: after beam search its rows are beams, rows that ended at
    different times have fillers behind their end, and what broke off is not whole. For one whose context has to be
    repeated, without a tokenizer, or where tokens came before that are not in `input_ids`. And where the model did not
    feed each token to the cache once, so that a part of the text was not generated under its budget.
    """
    cache.check_ended()
    check_token_ids(model, input_ids)
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
    mask = torch.cat([past, torch.ones_like(unfed), new], 1)  # over all that was seen: else generate cuts tokens off
    attach(model)
    options = _over_a_cache(model, options)
    if cache.awaits_repeat:
        options = _repeating(model, cache, fed, seen, options)
    try:
        out = model.generate(fed, attention_mask=mask, **generate_with_cache(cache), **options)
        if cache.store is not None:
            cache.store.check_scores()
        ids = out if isinstance(out, Tensor) else out.sequences
        beams = (_option(model, options, "num_beams") or 1) > 1
        _check_fed(cache.budgeted[0].columns - seen, ids.shape[1], beams)
    except BaseException as error:  # Ctrl-C, too
        if cache.budgeted[0].columns != seen:
            cache.break_off(f"a generation over it ended with {type(error).__name__}, and its tokens are lost")
        raise
    finally:
        cache.stop_recording()
    _remember(cache, ids, fed.shape[1], seen, _end_tokens(model, options), beams)
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


def _option(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """What generate goes by: an argument, else the given configuration's, else the model's."""
    if name in options:
        return options[name]
    value = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value


def _over_a_cache(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """The options, without what a generation configuration says of caches. Raises `ModelError` where they say it."""
    overruled = {}
    for name, needed in (("use_cache", True), ("cache_implementation", None)):
        if _option(model, options, name) in (None, True):
            continue
        if name in options:  # what a caller writes is refused, what a configuration brings along is overruled
            raise ModelError(f"kvpolicy.generate runs over the cache it is given: leave {name}={options[name]!r} out")
        overruled[name] = needed
    return options | overruled


def _check_fed(seen: int, length: int, beams: bool) -> None:
    """Raises `ModelError` unless a cache saw each token once. length: of what came back, the last token not fed."""
    if seen < length - 1 or (seen > length and not beams):  # beams may go on behind the end of the best one
        raise ModelError(
            f"the cache saw {seen} tokens, but {length - 1} had to be fed: the model dropped the cache on the way, or "
            "fed tokens twice, so this text was not generated under its budget"
        )


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
    ends = _option(model, options, "eos_token_id")
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def _remember(cache: RaggedCache, ids: Tensor, fed: int, seen: int, ends: list[int], beams: bool) -> None:
    """Notes what the next turn has to feed first, or why there cannot be one. ids: [rows, fed + generated]."""
    if cache.store is None or cache.store.batch_size != ids.shape[0] or beams:
        cache.end_turn(None, "its rows are beams or several samples of one prompt")
        return
    unfed = ids[:, cache.budgeted[0].columns - seen :].clone()
    # a row that ends with the very last token has no filler behind it
    is_end = torch.isin(ids[:, fed:-1], torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    apart = ids.shape[0] > 1 and bool(is_end.any())
    why = "some of its rows ended earlier than others, and fillers stand behind their end"
    cache.end_turn(unfed, why if apart else None)
