"""What a layer holds back until nobody reads it any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvpolicy.cache.arena import Chunk
from kvpolicy.cache.scoring import Scoring


@dataclass(slots=True, eq=False)
class Waiting:
    """New tokens of a layer whose keys and values others may still read (KV sharing)."""

    query: Tensor
    chunk: Chunk
    scoring: Scoring
    extra: Mapping[str, Any]
    prompt: bool
    left: int
    visible: Tensor | None
