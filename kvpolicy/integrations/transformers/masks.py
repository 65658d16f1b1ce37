"""A mask that is made when a layer knows which part of it it needs.

transformers builds one mask per kind of layer before the layers run. A ragged layer cannot use it: its entries are
scattered, and each KV head holds others. So the mask function hands on what it was given, and a layer asks for the
dense mask (stock caches, prompts) or for the part over the newest tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


class LazyMask:
    """The arguments of a mask function. Sliceable in its query rows, as some models do.

    given:  batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, ...
    device: where a layer wants it, None for where it is made
    """

    def __init__(self, base: str, given: dict[str, Any], rows: slice = slice(None)) -> None:
        self.base, self.given, self.rows = base, given, rows
        self.device: Any = None
        # made once and shared by the layers of one kind
        self._dense: dict[Any, Any] = {}  # by device
        self._newest: dict[int, Tensor] = {}  # by count
        self._valid: dict[int, Tensor | None] = {}

    def dense(self) -> Any:
        """What the stock mask function returns; None where it says that plain causal attention is right."""
        if None not in self._dense:
            whole = self.rows == slice(None)
            given = self.given if whole else self.given | {"allow_is_causal_skip": False}
            mask = ALL_MASK_ATTENTION_FUNCTIONS[self.base](**given)
            self._dense[None] = mask if whole or mask is None else mask[:, :, self.rows]
        if self.device not in self._dense:
            mask = self._dense[None]
            self._dense[self.device] = None if mask is None else mask.to(self.device)
        return self._dense[self.device]

    def newest(self, count: int) -> Tensor:
        """What each query sees of the newest `count` tokens: bool [B, 1, n, count]."""
        if count not in self._newest:
            end = int(self.given["q_offset"]) + int(self.given["q_length"])
            part = {"kv_offset": end - count, "kv_length": count, "allow_is_causal_skip": False}
            mask: Tensor = sdpa_mask(**self.given | part)
            self._newest[count] = mask[:, :, self.rows].expand(int(self.given["batch_size"]), -1, -1, -1)
        return self._newest[count] if self.device is None else self._newest[count].to(self.device)

    def valid(self, count: int) -> Tensor | None:
        """Which of the newest `count` tokens are no padding: bool [B, count], None if all of them."""
        padding: Tensor | None = self.given.get("attention_mask")
        if padding is None:
            return None
        if count not in self._valid:
            valid = padding[:, -count:].bool().cpu()
            self._valid[count] = None if bool(valid.all()) else valid
        return self._valid[count]

    def to(self, device: Any, *_: Any, **__: Any) -> LazyMask:
        """The same for a layer on another device; accelerate asks for it. It is made where it would be, then moved."""
        moved = LazyMask(self.base, self.given, self.rows)
        moved.device = torch.device(device)
        moved._dense, moved._newest, moved._valid = self._dense, self._newest, self._valid
        return moved

    def __getitem__(self, index: tuple[Any, ...]) -> LazyMask:
        """`mask[:, :, rows, :]`."""
        rows = index[2]
        whole = rows.start in (None, 0) and rows.stop is None
        if whole:
            return self
        part = LazyMask(self.base, self.given, rows)
        part.device = self.device
        return part


def make_mask(base: str, given: dict[str, Any]) -> Any:
    """What stands for the mask of one kind of layer. For a static cache, which is longer than the tokens seen, it is
    the stock mask: generate makes those ahead of the forward and looks into them. A mask over no columns is None: a
    static cache of ours holds no padding, and its one new token sees all of it.
    """
    if given["kv_length"] == 0:
        return None
    end = given["q_offset"] + given["q_length"]
    if isinstance(end, Tensor) or end != given["kv_offset"] + given["kv_length"]:
        return ALL_MASK_ATTENTION_FUNCTIONS[base](**given)
    return LazyMask(base, given)


def dense_mask(mask: Any) -> Any:
    """What the model's own attention takes."""
    return mask.dense() if isinstance(mask, LazyMask) else mask


def user_mask(mask: Tensor) -> Tensor:
    """A 4-D mask that a user gave, as bool of the same shape: True or 0 is visible, a very negative number is not.

    Raises `ValueError` for a mask with other values (a bias).
    """
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if bool((visible | (mask <= -1e4)).all()):
        return visible
    raise ValueError("it adds a bias to the scores")
