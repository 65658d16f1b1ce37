"""KIVI's cache: keys in groups of tokens per channel, values in groups of channels per token. A baseline of `compare`.

Source: KIVI, arXiv:2402.02750; jy-yuan/KIVI, models/llama_kivi.py and quant/new_pack.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.errors import ModelError
from kvpolicy.model.spec import ModelSpec

GROUP, RESIDUAL = 32, 128
_WORD = 32


def _grouped(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, size)


class Quantized(NamedTuple):
    """Rows [B, H, n, dim] in groups of 32 along one of the last two axes: `code = round((x - least) / step)`.

    codes: int32, `32 / bits` of them in a word, the first in the lowest bits;  step, least: of each group, in the rows'
    dtype. All of them have the axis of the groups last.
    per_channel: groups are of tokens, not of channels
    """

    codes: Tensor
    step: Tensor
    least: Tensor
    bits: int
    per_channel: bool

    @classmethod
    def of(cls, rows: Tensor, bits: int, *, per_channel: bool) -> Quantized:
        """What is grouped comes in a multiple of 32."""
        groups = _grouped(rows.transpose(2, 3) if per_channel else rows, GROUP)
        least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (largest - least) / (2**bits - 1)
        safe = torch.where(step == 0, 1, step)  # the source divides by it all the same
        codes = ((groups - least) / safe).clamp(0, 2**bits - 1).round().to(torch.int32)
        words = _grouped(codes.flatten(-2), _WORD // bits)
        shifts = torch.arange(0, _WORD, bits, device=rows.device, dtype=torch.int32)
        packed = (words << shifts).sum(-1, dtype=torch.int32)
        return cls(packed, step[..., 0], least[..., 0], bits, per_channel)

    @property
    def rows(self) -> Tensor:
        """[B, H, n, dim] as they come back."""
        shifts = torch.arange(0, _WORD, self.bits, device=self.codes.device, dtype=torch.int32)
        codes = _grouped(((self.codes[..., None] >> shifts) & (2**self.bits - 1)).flatten(-2), GROUP)
        rows: Tensor = (codes * self.step[..., None] + self.least[..., None]).flatten(-2)
        return rows.transpose(2, 3) if self.per_channel else rows

    def followed_by(self, other: Quantized) -> Quantized:
        """With later tokens behind these."""
        axis = -1 if self.per_channel else 2
        codes, step, least = (torch.cat(pair, axis) for pair in zip(self[:3], other[:3], strict=True))
        return self._replace(codes=codes, step=step, least=least)


class KiviLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """A layer of KIVI's cache.

    keys, values: the latest tokens, as they came: `tokens mod 128` keys, and 128 values
    quantized:    keys and values of all tokens before these
    """

    is_sliding = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.seen = bits, 0
        self.quantized: dict[str, Quantized] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states[:, :, :0], value_states[:, :, :0], True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """All keys and all values; the new ones are as they came until the next call."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        keys, values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        answer = self._behind("keys", keys), self._behind("values", values)
        self.keys = self._kept("keys", keys, keys.shape[2] % RESIDUAL, per_channel=True)
        self.values = self._kept("values", values, min(values.shape[2], RESIDUAL), per_channel=False)
        return answer

    def _behind(self, name: str, latest: Tensor) -> Tensor:
        own = self.quantized.get(name)
        return latest if own is None else torch.cat([own.rows, latest], 2)

    def _kept(self, name: str, rows: Tensor, exact: int, *, per_channel: bool) -> Tensor:
        """The last `exact` ones; those before them are quantized."""
        first = rows.shape[2] - exact
        if first:
            new = Quantized.of(rows[:, :, :first], self.bits, per_channel=per_channel)
            old = self.quantized.get(name)
            self.quantized[name] = new if old is None else old.followed_by(new)
        return rows[:, :, first:].clone()  # a view would keep the whole prompt

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # transformers 5.17
        return -1


def kivi_cache(model: PreTrainedModel, bits: int) -> Cache:
    """An empty cache of KIVI's, for a model that is not attached. bits: 2 or 4

    Raises `ModelError` for a model with other layers than full attention, and for head dims that are no multiple of 32.
    """
    spec = ModelSpec.from_config(model.config)
    kinds = {layer.kind for layer in spec.layers if layer.shared_with is None}
    dims = spec.attention.key_dim, spec.attention.value_dim
    if kinds != {"full"} or any(dim % GROUP for dim in dims):
        raise ModelError(
            f"KIVI's cache is for full attention, with head dims that are multiples of {GROUP}; {type(model).__name__} "
            f"has layers of {', '.join(sorted(kinds))} attention, keys of {dims[0]} and values of {dims[1]} channels"
        )
    return Cache(layers=[KiviLayer(bits) for layer in spec.layers if layer.shared_with is None])
