"""How far a layer of a cache has come with its text: one value, so that nobody has to know its parts to put it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.scoring import Scoring


@dataclass(slots=True, eq=False)
class Waiting:
    """New tokens of a layer whose keys and values others may still read (KV sharing).

    prompt:  whether nothing came before them
    readers: layers that have not read them yet
    visible: of a 2-D mask, as in `Reading`
    """

    query: Tensor
    chunk: Chunk
    scoring: Scoring
    extra: Mapping[str, Any]
    prompt: bool
    readers: int
    visible: Tensor | None

    def count_reader(self) -> None:
        """One layer has read them."""
        self.readers -= 1


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """columns: tokens seen, padding included
    filled:  bool [B, columns], those that hold a token; None as in `Reading`
    arrived: tokens whose attention has not come yet
    waiting: tokens whose part has not been kept yet
    """

    columns: int = 0
    filled: Tensor | None = None
    arrived: int = 0
    waiting: Waiting | None = None
