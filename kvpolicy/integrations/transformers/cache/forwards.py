"""Whether each forward over a cache has run to its end.

A forward gives the layers of a cache something in their order, once each. One that breaks off (an exception, Ctrl-C)
leaves layers that have seen its tokens before layers that have not, and the next one would go on over both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from kvpolicy.errors import ModelError


class WatchedCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A transformers cache that notices a forward that broke off, or that left it out.

    last:   index of the last layer with attention over the text; what comes behind it, if anything, is not watched
    dropped_at: tokens from which on the model drops a cache that began with fewer (Phi-3 and kin), or None
    broken: why nothing may use the cache any more, or None
    """

    def __init__(self, layers: list[Any], last: int, dropped_at: int | None) -> None:
        super().__init__(layers=layers)
        self.last, self.dropped_at = last, dropped_at
        self.broken: str | None = None
        self._announced = 0  # tokens that a mask was asked for, until they come
        self._touched: set[tuple[int, Any]] = set()  # by the forward that runs now, or by the last one

    def check_ended(self) -> None:
        """Raises `ModelError` unless every forward that began has ended."""
        if self.broken is not None:
            raise ModelError(f"this cache cannot be used any more: {self.broken}. reset() it, or make a new one")
        # layers come in their order, so the furthest one tells; where none came, nothing broke off
        reached = max(layer for layer, _ in self._touched) if self._touched else self.last
        if reached < self.last:
            raise ModelError(
                f"a forward broke off behind layer {reached} of {self.last + 1}, so the layers of this cache have seen "
                "different tokens: reset() it, or make a new one"
            )

    def touch(self, layer: int, what: Any) -> None:
        """A forward gives a layer something, each thing once. Raises `ModelError` as `check_ended` does."""
        if (layer, what) in self._touched:  # the next forward
            self.check_ended()
            self._touched.clear()
        self._announced = 0  # the tokens have come
        self._touched.add((layer, what))

    def announce(self, count: int) -> None:
        """A forward of `count` tokens asks for its mask, or for another one.

        Raises `ModelError` where tokens were announced before that never came, and where the model would have dropped
        the cache.
        """
        # asked for only where there is a limit: of a static cache it waits for the device
        limit, before = self.dropped_at, 0 if self.dropped_at is None else int(self.get_seq_length())
        if limit is not None and 0 < before <= limit < before + count:
            raise ModelError(
                f"this model cannot go on with a cache beyond {limit} tokens if it began below (under longrope its "
                f"keys are others from there on): {before} were seen, {count} come. Keep the conversation shorter, "
                "or begin with a longer prompt"
            )
        if self._announced not in (0, count):
            raise ModelError(
                f"this cache was asked for a mask of {self._announced} tokens, and they never came: the model dropped "
                "the cache (gradient checkpointing does while training: model.eval()), or the forward broke off. "
                "reset() it, or make a new one"
            )
        self._announced = count

    def withdraw(self) -> None:
        """The forward that announced its tokens is refused before any layer takes them."""
        self._announced = 0

    def break_off(self, why: str) -> None:
        """What fed this cache did not come to its end, so nobody knows what it has seen."""
        self.broken = why

    def forget(self) -> None:
        """What was noticed so far does not matter any more."""
        self.broken, self._announced = None, 0
        self._touched.clear()

    # --- what transformers calls on a cache

    def __bool__(self) -> bool:
        """False for the models that ask `if cache and ...` before they drop it; `announce` says where it had to be."""
        return self.dropped_at is None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.touch(layer_idx, "keys")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.touch(layer_idx, ("convolution", args[:1] or kwargs.get("state_idx")))  # some layers have several
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.touch(layer_idx, ("recurrence", args[:1] or kwargs.get("state_idx")))
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self.announce(query_length)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes


def check_fed_once(positions: Any, count: int, seen: Tensor) -> None:
    """Raises `ModelError` where `count` tokens begin a text again that the cache has seen, as generate has it under
    use_cache=False: at each step the whole text.

    positions: what the model says of the new tokens, int64 [B or 1, count] if it says anything
    seen:      int64 [B] on the CPU, tokens before these
    """
    if count == 1 or not bool(seen.any()) or not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    ends = positions[:, [0, -1]].cpu()  # waits for the device once, in a later chunk or turn alone
    again = (ends[:, 0] == 0) & (ends[:, 1] == count - 1) & (seen > 0)
    if bool(again.any()):
        raise ModelError(
            "a text came again from its beginning that this cache has seen: under use_cache=False generate feeds the "
            "whole text at each step. Leave that out (generation_config.use_cache too), or begin with a new cache"
        )
