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

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.columns import Reading, read_mask


class Seen(int):
    """Columns that a layer of ours reports to a mask function, which learns by the type whom its mask is for."""


class LazyMask:
    """The arguments of a mask function. Sliceable in its query rows, as some models do.

    given:  batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, ...
    device: where a layer wants it, None for where it is made
    """

    def __init__(self, base: str, arguments: dict[str, Any], rows: slice = slice(None)) -> None:
        self.base, self.arguments, self.rows = base, arguments, rows
        self.device: Any = None
        # made once and shared by the layers of one kind
        self._dense: dict[Any, Any] = {}  # by device
        self._newest: dict[int, Tensor] = {}  # by count
        self._readings: dict[int, Reading] = {}  # by the columns before

    def dense(self) -> Any:
        """What the stock mask function returns; None where it says that plain causal attention is right."""
        if None not in self._dense:
            whole = self.rows == slice(None)
            arguments = self.arguments if whole else self.arguments | {"allow_is_causal_skip": False}
            mask = ALL_MASK_ATTENTION_FUNCTIONS[self.base](**arguments)
            self._dense[None] = mask if whole or mask is None else mask[:, :, self.rows]
        if self.device not in self._dense:
            mask = self._dense[None]
            self._dense[self.device] = None if mask is None else mask.to(self.device)
        return self._dense[self.device]

    def newest(self, count: int) -> Tensor:
        """What each query sees of the newest `count` tokens: bool [B, 1, n, count]."""
        if count not in self._newest:
            end = int(self.arguments["q_offset"]) + int(self.arguments["q_length"])
            part = {"kv_offset": end - count, "kv_length": count, "allow_is_causal_skip": False}
            mask: Tensor = sdpa_mask(**self.arguments | part)
            self._newest[count] = mask[:, :, self.rows].expand(int(self.arguments["batch_size"]), -1, -1, -1)
        return self._newest[count] if self.device is None else self._newest[count].to(self.device)

    def read(self, before: int, seen: Tensor, filled: Tensor | None, may_be_cut: bool) -> Reading:
        """What the 2-D mask says of new and of earlier tokens, as in `read_mask`."""
        if before not in self._readings:
            count = int(self.arguments["q_length"])
            mask = self.arguments.get("attention_mask")
            self._readings[before] = read_mask(mask, count, before, seen, filled, may_be_cut)
        return self._readings[before]

    def to(self, device: Any, *_: Any, **__: Any) -> LazyMask:
        """The same for a layer on another device; accelerate asks for it. It is made where it would be, then moved."""
        moved = LazyMask(self.base, self.arguments, self.rows)
        moved.device = torch.device(device)
        moved._dense, moved._newest, moved._readings = self._dense, self._newest, self._readings
        return moved

    def __getitem__(self, index: tuple[Any, ...]) -> LazyMask:
        """`mask[:, :, rows, :]`."""
        rows = index[2]
        whole = rows.start in (None, 0) and rows.stop is None
        if whole:
            return self
        part = LazyMask(self.base, self.arguments, rows)
        part.device = self.device
        return part


def make_mask(base: str, arguments: dict[str, Any]) -> Any:
    """What stands for the mask of one kind of layer.

    Where the cache is none of ours it is the stock mask, so that a model can be detached while a forward over a stock
    cache runs. A mask over no columns is None: the token of a step that may be recorded sees all that is there.
    """
    length = arguments["kv_length"]
    if length == 0:
        return None
    if not isinstance(length, Seen):
        return ALL_MASK_ATTENTION_FUNCTIONS[base](**arguments)
    return LazyMask(base, arguments)


def dense_mask(mask: Any) -> Any:
    """What the model's own attention takes."""
    return mask.dense() if isinstance(mask, LazyMask) else mask


def user_mask(mask: Any, columns: int | None = None) -> Tensor:
    """A 4-D mask that a user gave, as bool of the same shape: True or 0 is visible, a very negative number is not.

    columns: how many it has to have

    Raises `ModelError` for a mask of another kind or shape, for one of its own for each head, and for one with other
    values (a bias).
    """
    why = None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        why = f"it is a {type(mask).__name__}, expected a tensor [B, 1, queries, columns]"
    elif mask.shape[1] != 1 or columns not in (None, mask.shape[3]):
        why = f"its shape is {list(mask.shape)}, expected [B, 1, queries, {columns or 'columns'}]"
    elif mask.dtype == torch.bool:
        return mask
    else:
        visible = mask == 0
        if bool((visible | (mask <= -1e4)).all()):
            return visible
        why = "it adds a bias to the scores"
    raise ModelError(f"this attention mask cannot be used on a compressed cache: {why}")
