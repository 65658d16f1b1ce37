"""How an attention module turns its keys by position, found by asking it.

Architectures differ in which dimensions they pair, how many they leave alone, and in which layers they turn any. So a
module is run on one token up to the point where it hands its keys to a cache: once with every angle 0, once with a
quarter turn. What has moved where tells the pairs. The frequencies are a buffer of the model's rotary embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.attention_modules import device_of
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.plugins.activations import Rotary

_BUFFERS = ("inv_freq", "full_attention_inv_freq")  # budgeted layers are those of full attention
_ROTATIONS: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, nn.Module, str]] = WeakKeyDictionary()


def find_rotary(model: PreTrainedModel, attentions: Sequence[nn.Module]) -> None:
    """Looks, once, at how each of these attention modules turns its keys.

    Raises `ModelError` for a rotation that is not understood.
    """
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    for attention in attentions:
        if attention not in _ROTATIONS:
            embedding, buffer = _embedding(modules, names[attention])
            first, second = _pairs(attention, getattr(embedding, buffer).numel())
            _ROTATIONS[attention] = first, second, embedding, buffer


def rotary_of(attention: nn.Module) -> Rotary:
    """What `find_rotary` has found, with the frequencies of now: some models change them as the text grows."""
    first, second, embedding, buffer = _ROTATIONS[attention]
    frequencies = getattr(embedding, buffer).float().to(first.device)
    return Rotary(first, second, frequencies[: len(first)])


def _embedding(modules: dict[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The rotary embedding nearest to an attention module, and its buffer of frequencies."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        for child in modules[parent].children():
            for buffer in _BUFFERS:
                if isinstance(getattr(child, buffer, None), Tensor):
                    if hasattr(child, "mrope_section"):
                        _refuse(modules[name], "turns by several positions for each token")
                    return child, buffer
    _refuse(modules[name], "has no rotary embedding that kvpolicy recognises")


def _pairs(attention: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The dimensions that turn together, int64 [count] each, or [0] where none does."""
    still, turned = (_keys(attention, count, angle) for angle in (0.0, torch.pi / 2))
    if torch.allclose(still, turned):
        return (torch.empty(0, dtype=torch.int64, device=still.device),) * 2
    order = torch.arange(count, device=still.device)
    for first, second in ((order, order + count), (2 * order, 2 * order + 1)):
        expected = still.clone()
        expected[..., first], expected[..., second] = -still[..., second], still[..., first]
        if torch.allclose(expected, turned, rtol=1e-3, atol=1e-6):
            return first, second
    _refuse(attention, "pairs dimensions in an order that kvpolicy does not know")


def _keys(attention: nn.Module, count: int, angle: float) -> Tensor:
    """Keys of one token, every pair turned by the same angle, [1, H, 1, D]."""
    like, device = next(attention.parameters()), device_of(attention)
    width = getattr(attention.config, "hidden_size", 0)
    hidden = torch.arange(1, width + 1, device=device).sin().to(like.dtype)[None, None]
    for columns in (2 * count, count):  # architectures differ in how many they expect
        turn = torch.full((1, 1, columns), angle, device=device)
        options = {"position_embeddings": tuple(x.round().to(like.dtype) for x in (turn.cos(), turn.sin()))}
        with contextlib.suppress(RuntimeError, TypeError, AttributeError, IndexError), torch.no_grad():
            try:
                attention.forward(hidden, **options, attention_mask=None, **with_cache(attention, _Catching()))
            except _CaughtKeys as caught:
                return caught.keys
    _refuse(attention, "cannot be asked how it turns its keys")


class _CaughtKeys(Exception):  # no error: it ends the forward
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class _Catching:
    """In the place of an empty cache: takes the keys and ends the forward."""

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(self, keys: Tensor, *_: Any, **__: Any) -> NoReturn:
        raise _CaughtKeys(keys)


def _refuse(attention: nn.Module, why: str) -> NoReturn:
    raise ModelError(
        f"{type(attention).__name__} {why}: plugins that require 'rotary' cannot run on this model; use others"
    )
