"""Having a model repeat its context, so that a policy sees which entries that takes.

Source: KVzip, arXiv:2505.23416; snu-mllab/KVzip, attention/score.py; NVIDIA/kvpress, kvpress/presses/kvzip_press.py.
The prompt has been read over a full cache. Then the model is given an instruction and the context again, chunk by
chunk, over that same cache. What is fed in this pass leaves no trace; only then does each layer keep its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.cache.attention_mass import attention_mass
from kvpolicy.cache.scoring import Scoring
from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.cache.layer_state import Waiting
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import chat_turn, check_token_ids
from kvpolicy.integrations.transformers.model.versions import with_cache

_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_LEAD = 8


@torch.no_grad()
def repeat_context(
    model: PreTrainedModel,
    cache: RaggedCache,
    context_ids: Tensor,
    instruction: PreTrainedTokenizerBase | Tensor,
    *,
    attention_mask: Tensor | None = None,
    next_position: Tensor | None = None,
) -> None:
    """Has the model repeat its context over the full cache; then the cache keeps what its budget allows.

    For a cache whose policy requires `repeat_attention`, once, after the prompt and before decoding. The context is
    repeated in chunks of the policy's `repeat_chunk` tokens.

    context_ids: int64 [B, n], the tokens that are repeated; as a rule those that the cache has seen
    instruction: the model's tokenizer, for "Repeat the previous context exactly." in its chat template; or int64 [k],
        tokens of your own that stand in front of each chunk
    attention_mask: [B, n] of `context_ids`, 0 for padding. None: no padding
    next_position: int64 [B], the position of each row's next token. None: the columns seen, padding included, as a
        model counts by itself; `generate` counts tokens

    What is fed here is not kept: lengths and positions are those of the prompt. Raises `ModelError` for a cache that is
    empty or waits for no repetition, and for tokens that do not fit it.
    """
    if not cache.awaits_repeat:
        raise ModelError(
            "this cache waits for no repetition: its policy does not require repeat_attention, or the context has been "
            "repeated already, or nothing is ever evicted (retention 1)"
        )
    check_token_ids(model, context_ids, "context_ids")
    rows = _rows(cache, context_ids, attention_mask)
    columns = torch.full((len(rows),), cache.budgeted[0].columns)
    positions = columns if next_position is None else next_position.cpu()
    if positions.shape != columns.shape:
        raise ModelError(f"expected next_position [{len(rows)}], got {list(positions.shape)}")
    repetition = Repetition(cache)
    for pieces in _chunks(rows, cache.opened().policy.repeat_chunk, _instruction(instruction)):
        with cache.peek(repetition.note):
            _feed(model, cache, pieces, positions)
    repetition.settle()


@dataclass(frozen=True, slots=True)
class _Instruction:
    """What stands in front of the chunks: int64 [k] each.

    first, later: of the first chunk, and of the others
    lead:   last tokens of the chunk before, which follow `later`
    answer: behind them, what ends the user's turn and begins the model's
    """

    first: Tensor
    later: Tensor
    lead: int
    answer: Tensor


class Repetition:
    """What the entries of each layer are given while the context is repeated.

    peaks: float32 [B, H, n] of each row of the budget, over the tokens pending there
    extra: what else the policy requires of a layer
    """

    def __init__(self, cache: RaggedCache) -> None:
        self.cache = cache
        self.peaks: dict[int, Tensor] = {}
        self.extra: dict[int, Any] = {}

    def settle(self) -> None:
        """Lets each layer keep its part, in order."""
        store = self.cache.opened()
        for row, peaks in sorted(self.peaks.items()):
            layer = store.layers[row]
            assert layer is not None and layer.pending is not None  # the pass attended to it
            extra = self.extra[row] | {"repeat_attention": peaks}
            store.keep(row, layer.pending.key[:, :, :0], layer.pending, Scoring(), extra=extra)

    def note(self, row: int, waiting: Waiting) -> None:
        """Takes what one layer has seen in a forward."""
        layer = self.cache.opened().layers[row]
        assert layer is not None  # it has just attended
        options, fed = waiting.scoring.options(), waiting.query.shape[2]
        peaks = attention_mass(layer.arena, waiting.query, waiting.chunk, options, "max")[..., :-fed]
        self.peaks[row] = torch.maximum(self.peaks[row], peaks) if row in self.peaks else peaks
        self.extra[row] = waiting.extra


def _feed(model: PreTrainedModel, cache: RaggedCache, pieces: Sequence[Tensor], positions: Tensor) -> None:
    """One forward of a piece for each row, padded on the left. positions: int64 [B], of the first token."""
    length = max(map(len, pieces))
    ids = torch.stack([torch.nn.functional.pad(piece, (length - len(piece), 0)) for piece in pieces])
    valid = torch.stack([torch.arange(length) >= length - len(piece) for piece in pieces])
    first = cache.opened().layers[0]
    assert first is not None and first.pending is not None
    mask = torch.cat([first.pending.positions >= 0, valid], 1)
    places = (positions[:, None] + valid.cumsum(1) - 1).clamp(min=0)
    ids, mask, places = (x.to(model.device) for x in (ids, mask.long(), places))
    model(
        ids, attention_mask=mask, position_ids=places, **with_cache(model, cache), use_cache=True, **keep_logits(model)
    )


def _chunks(rows: Sequence[Tensor], size: int, instruction: _Instruction) -> Iterator[list[Tensor]]:
    """What is fed for each row: the instruction and a chunk; nothing for a row that has been repeated."""
    for begin in range(0, max(map(len, rows)), size):
        pieces = []
        for row in rows:
            lead = row[max(0, begin - instruction.lead) : begin]
            front = [instruction.later, lead] if begin else [instruction.first]
            chunk = row[begin : begin + size]
            pieces.append(torch.cat([*front, instruction.answer, chunk]) if len(chunk) else chunk)
        yield pieces


def _rows(cache: RaggedCache, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row, padding left out, on the CPU."""
    batch = cache.opened().batch_size
    if ids.dim() != 2 or ids.shape[0] != batch or (mask is not None and mask.shape != ids.shape):
        came = None if mask is None else list(mask.shape)
        raise ModelError(
            f"this cache holds {batch} sequences: expected context_ids [{batch}, n] and an attention_mask of that "
            f"shape or None, got {list(ids.shape)} and {came}"
        )
    valid = torch.ones_like(ids) if mask is None else mask
    rows = [row[keep] for row, keep in zip(ids.cpu(), valid.bool().cpu(), strict=True)]
    if not max(map(len, rows)):
        raise ModelError("context_ids holds no token to repeat")
    return rows


def _instruction(source: PreTrainedTokenizerBase | Tensor) -> _Instruction:
    if isinstance(source, Tensor):
        if source.dim() != 1 or source.dtype != torch.int64 or not len(source):
            raise ModelError(
                f"an instruction of your own must be int64 [k] with k >= 1, got {source.dtype} {list(source.shape)}"
            )
        return _Instruction(source.cpu(), source.cpu(), 0, source.cpu()[:0])
    if not isinstance(source, PreTrainedTokenizerBase):
        raise ModelError(f"the instruction must be the model's tokenizer or int64 [k], got {type(source).__name__}")
    texts = (_FIRST, _LATER, _answer(source))
    first, later, answer = (torch.tensor(source.encode(x, add_special_tokens=False), dtype=torch.int64) for x in texts)
    return _Instruction(first, later, _LEAD, answer)


def _answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts between a user's words and the model's; without one, a line break."""
    if not tokenizer.chat_template:
        return "\n"
    words = "the words of the user"
    return chat_turn(tokenizer, words, enable_thinking=False).rpartition(words)[2]
