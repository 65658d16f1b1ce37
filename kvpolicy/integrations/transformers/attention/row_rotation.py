"""Rotations by the longest row of a batch, made to be by each row's own length.

Under longrope a model turns keys by other frequencies once a text is longer than those that it was first trained on,
and asks the longest row for all of them. Rows that are sequences of their own are to be turned as they are alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.errors import ModelError


class LongRotation(NamedTuple):
    """limit: the longest text of the short frequencies"""

    embedding: nn.Module
    limit: int


def long_rotations(model: PreTrainedModel) -> list[LongRotation]:
    """The rotary embeddings whose frequencies depend on whether a text is long.

    Raises `ModelError` for rotations that depend on the longest text that came before, or in other ways.
    """
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if kind == "longrope":
            found.append(LongRotation(module, module.config.rope_parameters["original_max_position_embeddings"]))
        elif bad := sorted(str(x) for x in kinds if x == "longrope" or "dynamic" in str(x)):
            raise ModelError(
                f"this model turns its keys by the longest of all sequences (rope_type '{bad[0]}'), so in slots none "
                "would be as alone: decode each with DecodeRunner over a cache of its own"
            )
    return found


@contextmanager
def rows_alone(rotations: Sequence[LongRotation]) -> Iterator[None]:
    """Within the context each row is turned as if it were alone. For rows of one token."""
    before = [vars(embedding).get("forward") for embedding, _ in rotations]
    for embedding, limit in rotations:
        vars(embedding)["forward"] = _by_row(embedding.forward, limit)
    try:
        yield
    finally:
        for (embedding, _), own in zip(rotations, before, strict=True):
            del vars(embedding)["forward"]
            if own is not None:
                vars(embedding)["forward"] = own


def _by_row(forward: Callable[..., tuple[Tensor, ...]], limit: int) -> Callable[..., tuple[Tensor, ...]]:
    """Both turns of all rows, and of each row the one that is its own. forward: of a rotary embedding"""

    def turned(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        short, long = forward(x, position_ids.clamp(max=limit - 1)), forward(x, position_ids.clamp(min=limit))
        is_long = (position_ids >= limit)[..., None]
        return tuple(torch.where(is_long, b, a) for a, b in zip(short, long, strict=True))

    return turned
