"""Which columns of a cache hold a token, and what a mask says of them.

The masks of transformers speak of columns: all that was ever fed, padding included. A ragged cache keeps tokens, by
position, and none for padding. So a mask has to be read: which of the new tokens are padding, and whether it hides some
that were cached before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What the mask of a forward of n tokens says, all on the CPU.

    valid:   bool [B, n], which of the new tokens are no padding; None if all of them
    visible: bool [B, columns before], which of the earlier ones are seen; None if all that hold a token
    filled:  bool [B, columns], which hold a token; None while padding stands before a row's first token alone
    """

    valid: Tensor | None = None
    visible: Tensor | None = None
    filled: Tensor | None = None


def read_mask(
    mask: Tensor | None, count: int, before: int, seen: Tensor, filled: Tensor | None, may_be_cut: bool = False
) -> Reading:
    """mask: bool or 0 and 1, [B, columns]; None hides nothing.

    count, before: new tokens, and columns before them
    seen, filled:  int64 [B], tokens among the columns before; which of these they are, as in `Reading`

    may_be_cut:    a mask of fewer columns that hides none of them hides nothing: assisted generation of transformers
                   5.17 cuts its mask to the text of this turn

    Raises `ModelError` for a mask of fewer columns, and for one that shows what was padding when it came.
    """
    end = before + count
    if mask is None or (may_be_cut and mask.shape[1] < end and bool(mask.all())):
        return Reading(filled=None if filled is None else torch.nn.functional.pad(filled, (0, count), value=True))
    if mask.shape[1] < end:
        raise ModelError(
            f"attention_mask has {mask.shape[1]} columns, expected {end}: one for each of {before} columns that "
            f"the cache has seen and of {count} new ones"
        )
    mask, padding = mask[:, :end].expand(len(seen), -1), before - seen
    # All that is asked of the device in a usual forward: two numbers a row, once for all layers. `generate`, which is
    # who gives a mask to every step, waits there for its tokens anyway; a step without a mask waits for nothing.
    shown, first = torch.stack([mask.sum(1), mask.long().argmax(1)]).cpu()
    first = torch.where(shown == 0, end, first)
    as_before = filled is None and torch.equal(first.clamp(max=before), padding)
    if as_before and torch.equal(first + shown, torch.full_like(first, end)):
        valid = torch.arange(before, end) >= first[:, None]
        return Reading(valid=None if bool(valid.all()) else valid)
    return _read_columns(mask.bool().cpu(), before, filled_columns(before, padding) if filled is None else filled)


def _read_columns(mask: Tensor, before: int, filled: Tensor) -> Reading:
    """A mask that is not just padding at the start of rows."""
    visible, valid = mask[:, :before], mask[:, before:]
    if bool((visible & ~filled).any()):
        raise ModelError(
            "attention_mask shows columns that it called padding when they came: padding is not cached, so it cannot "
            "be seen later. Give the mask that was given then, and behind it the new tokens"
        )
    hidden = not torch.equal(visible, filled)
    filled = torch.cat([filled, valid], 1)
    holes = bool((filled[:, 1:] < filled[:, :-1]).any())
    return Reading(None if bool(valid.all()) else valid, visible if hidden else None, filled if holes else None)


def seen_by(store: RaggedStore, row: int) -> Tensor:
    """Tokens of each sequence that a layer has seen, int64 [B]."""
    layer = store.layers[row]
    return torch.zeros(store.batch_size, dtype=torch.int64) if layer is None else layer.seen


def filled_columns(columns: int, padding: Tensor) -> Tensor:
    """Columns that hold a token, bool [B, columns], where padding stands at the start of rows. padding: int64 [B]."""
    return torch.arange(columns) >= padding[:, None]


def entry_masks(visible: Tensor, filled: Tensor, positions: Sequence[Tensor], num_queries: int) -> list[Tensor]:
    """Which entries of each segment are seen: bool [num_queries, length] each.

    visible:   bool [B, 1, num_queries or 1, columns]
    filled:    bool [B, columns]
    positions: int64 [length] of each segment's entries
    """
    columns = [row.nonzero()[:, 0] for row in filled]
    num_heads = len(positions) // len(columns)
    masks = []
    for segment, places in enumerate(positions):
        row = segment // num_heads
        at = columns[row].to(visible.device)[places.to(visible.device)]
        masks.append(visible[row, 0][:, at].expand(num_queries, -1).to(places.device))
    return masks
