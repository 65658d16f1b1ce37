"""What a model notes about the text it reads, outside its cache: a cache of ours carries it from forward to forward.

Models with positions in three dimensions (M-RoPE: Qwen2-VL and those after it) note how far the positions of a text run
ahead of its columns, for whichever text came last. After another chat on the same model, or with a cache that was
loaded, that is the wrong text's.
"""

from __future__ import annotations

import weakref
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvpolicy.cache.copies import copy_with

_NAME = "rope_deltas"
_ENTERED: WeakKeyDictionary[nn.Module, ModelState] = WeakKeyDictionary()
"""Whose state a model has, from the question how long the cache is until the forward reaches it."""


class ModelState:
    """The state of a model for the text in one cache.

    deltas: int64 [B, 1] of the rows, or of the prompts that they came from; None where none is known
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders = [weakref.ref(module) for module in model.modules() if _NAME in vars(module)]
        self.deltas: Tensor | None = None

    def enter(self) -> None:
        """Gives the model this text's, unless it has it: what the model changes before its forward is this text's too.

        Not for two threads on one model.
        """
        for holder in self._alive():
            if _ENTERED.get(holder) is not self:
                _ENTERED[holder] = self
                setattr(holder, _NAME, self.deltas)

    def leave(self) -> None:
        """Takes over what the model has for the forward that runs."""
        for holder in self._alive():
            if _ENTERED.get(holder) is self:
                del _ENTERED[holder]
                self.deltas = getattr(holder, _NAME)

    def take(self, rows: Tensor, batch_size: int) -> None:
        """Keeps these rows of `batch_size`. rows: int64 [B']."""
        if self.deltas is not None:
            deltas = self.deltas.repeat_interleave(batch_size // len(self.deltas), dim=0)
            self.deltas = deltas[rows.to(deltas.device)]

    def resume(self, deltas: Tensor) -> None:
        """Goes on with a text whose state was saved. deltas: int64 [rows, 1]."""
        self.deltas = deltas

    def fork(self) -> ModelState:
        """A copy, which the model does not have."""
        self.leave()
        return copy_with(self)

    def forget(self) -> None:
        self.leave()
        self.deltas = None

    @property
    def is_carried(self) -> bool:
        """Whether the model counts positions by what it has noted of the text."""
        return bool(self._holders)

    def _alive(self) -> list[nn.Module]:
        if not self._holders or torch.compiler.is_compiling():
            return []
        return [holder for reference in self._holders if (holder := reference()) is not None]
