"""What the keys of a head have in common: their mean, turned by position.

Codes of few bits would be spent on it. At a position p the turned mean is a sum of one wave for each pair of channels.
Pairs that turn slowly are nearly constant over the positions there are, and a constant costs attention nothing. Where
it leaves too much, each head has a few frequencies of its own besides, whose waves and a constant come nearest to its
turned mean, by least squares: pairs that turn fast have little, and those that turn slowly look alike.
"""

from __future__ import annotations

import warnings
from typing import TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from kvpolicy_kernels.key_centre import CIRCLE, KeyCentre
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.errors import FormatWarning, ModelError
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.exchange import text_config
from kvpolicy.integrations.transformers.attention.mean_key import MeanKey, mean_keys
from kvpolicy.integrations.transformers.attention.rotary import find_rotary, rotary_of
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.activations import Rotary

WAVES = 8
"""Frequencies of each head of a layer that has any."""
WORTH = 4.0
"""A layer has them where without them so many times as much is left of its keys. They cost attention a third more."""
NEAR, REACH = 4096, 32768
"""Positions that count: each doubling from `NEAR` on to what the model was made for, or to `REACH`, as much."""
_RIDGE = 1e-6  # so that waves which are all but the same do not take each other off
_Weights: TypeAlias = tuple[tuple[int, int], ...]
_TOLD: WeakSet[nn.Module] = WeakSet()
_CENTRES: WeakKeyDictionary[nn.Module, tuple[_Weights, KeyCentre]] = WeakKeyDictionary()


def key_centres(model: PreTrainedModel, spec: ModelSpec) -> list[KeyCentre | None]:
    """Of each budgeted layer, for the KV heads held here; all caches of a model share them.

    Runs the model on a few tokens, once until weights of its attention are others. None where `find_rotary` does not
    know a rotation; warns then, with `FormatWarning` and once for a model, if keys have a bias.
    """
    attentions = [attention for attention, _ in attention_modules(model, spec.budgeted_layers)]
    try:
        find_rotary(model, attentions)
    except ModelError as error:
        if model not in _TOLD and any(map(_has_bias, attentions)):
            _TOLD.add(model)
            warnings.warn(_encoded_whole(model, error), FormatWarning, stacklevel=2)
        return [None] * len(attentions)
    if any(attention not in _CENTRES or _CENTRES[attention][0] != _weights(attention) for attention in attentions):
        reach = getattr(text_config(model), "max_position_embeddings", None) or REACH
        with torch.inference_mode(False):  # what is made here outlives that mode
            for attention, keys in zip(attentions, mean_keys(model, attentions), strict=True):
                _CENTRES[attention] = _weights(attention), _centre(keys, rotary_of(attention), reach)
    return [_CENTRES[attention][1] for attention in attentions]


def _weights(attention: nn.Module) -> _Weights:
    """What is another where they are."""
    return tuple((own.data_ptr(), 0 if own.is_inference() else own._version) for own in attention.parameters())


def _has_bias(attention: nn.Module) -> bool:
    names = ("k_proj", "qkv_proj", "query_key_value", "qkv", "Wqkv", "c_attn")
    return any(isinstance(getattr(getattr(attention, name, None), "bias", None), Tensor) for name in names)


def _encoded_whole(model: PreTrainedModel, why: ModelError) -> str:
    return (
        f"{type(model).__name__}: keys have a bias that cannot be taken off before they are encoded "
        f"({str(why).partition(':')[0]}). Where it is large, as Qwen2.5's is, 'int4' loses most of the quality, and "
        "'int8' some: use format='model', or measure the loss, as `kvpolicy compare full full@int8 full@int4` does"
    )


def _centre(keys: MeanKey, rotary: Rotary, reach: int) -> KeyCentre:
    """Worked out on the CPU."""
    own, frequencies = keys.mean.double().cpu(), rotary.frequencies.double().cpu()
    first, second = rotary.first.cpu(), rotary.second.cpu()
    count = len(frequencies)
    # functions of the position, M of them: 1, the cosines, the sines
    cosines, sines = torch.arange(1, count + 1), torch.arange(count + 1, 2 * count + 1)
    turned = own.new_zeros(*own.shape, 1 + 2 * count)  # [H, D, M], the turned mean as a sum of them
    turned[..., 0] = own
    turned[:, torch.cat([first, second]), 0] = 0
    turned[:, first, cosines], turned[:, first, sines] = own[:, first], -own[:, second]
    turned[:, second, cosines], turned[:, second, sines] = own[:, second], own[:, first]
    products = _products(frequencies, reach)

    def fitted(waves: Tensor) -> tuple[Tensor, float]:
        """Coefficients [H, 1 + 2 J, D], and what they leave of keys. waves: int64 [H, J]"""
        used = torch.stack([cosines[waves], sines[waves]], -1).flatten(1)
        used = torch.cat([used.new_zeros(len(used), 1), used], 1)
        with_all = products[used] @ turned.mT
        coefficients = torch.linalg.solve(_columns(products[used], used), with_all)
        whole = ((turned @ products) * turned).sum()
        return coefficients, keys.spread + float(whole - (coefficients * with_all).sum())

    waves = _nearest(turned, products)
    (constant, left), (moving, least) = fitted(waves[:, :0]), fitted(waves)
    coefficients, waves = (constant, waves[:, :0]) if left <= WORTH * least else (moving, waves)
    device = keys.mean.device
    return KeyCentre(
        coefficients.transpose(0, 1).float().contiguous().to(device),
        (frequencies * (CIRCLE / (2 * torch.pi))).round().to(torch.int32)[waves].contiguous().to(device),
    )


def _nearest(turned: Tensor, products: Tensor) -> Tensor:
    """The frequencies of each head, int64 [H, J], chosen one by one: the one that leaves least.

    turned: [H, D, M];  products: [M, M], of the functions with each other
    """
    count = len(products) // 2
    # of what is not in the span of those that are chosen: products of channels with functions, and of functions
    left, others = turned @ products, products.expand(len(turned), -1, -1)
    taken, chosen = torch.zeros(len(turned), 1, dtype=torch.int64), turned.new_zeros(len(turned), 0, dtype=torch.int64)
    for _ in range(min(WAVES, count) + 1):
        columns = _columns(others, taken)
        shares = torch.linalg.solve(_columns(columns.mT, taken), columns.mT)
        left, others = left - _columns(left, taken) @ shares, others - columns @ shares
        if chosen.shape[1] == min(WAVES, count):
            break
        of_cosine, of_sine = left[..., 1 : count + 1], left[..., count + 1 :]
        cosine, sine = others.diagonal(dim1=1, dim2=2)[:, 1:].unflatten(1, (2, count)).unbind(1)
        both = others.diagonal(count, dim1=1, dim2=2)[:, 1:]
        gained = of_cosine.square().sum(1) * sine + of_sine.square().sum(1) * cosine
        gained = (gained - 2 * (of_cosine * of_sine).sum(1) * both) / (cosine * sine - both.square())
        best = gained.scatter(1, chosen, -1.0).argmax(1, keepdim=True)
        chosen, taken = torch.cat([chosen, best], 1), torch.cat([1 + best, 1 + count + best], 1)
    return chosen


def _columns(matrices: Tensor, which: Tensor) -> Tensor:
    """[H, N, I] of [H, N, M]. which: int64 [H, I]"""
    return matrices.gather(2, which[:, None].expand(-1, matrices.shape[1], -1))


def _products(frequencies: Tensor, reach: int) -> Tensor:
    """float64 [M, M]: the mean of the product of two of the functions 1, cos(p f), sin(p f) over the positions p."""
    waves = torch.cat([frequencies.new_zeros(1), frequencies])
    counts = [reach]
    while counts[-1] >= 2 * NEAR:
        counts.append(counts[-1] // 2)
    less, more = (
        torch.stack([_mean_turn(waves[:, None] + sign * waves, count) for count in counts]).mean(0) for sign in (-1, 1)
    )
    cosines, sines, mixed = (less.real + more.real) / 2, (less.real - more.real) / 2, (more.imag - less.imag) / 2
    whole = torch.cat([torch.cat([cosines, mixed], 1), torch.cat([mixed.T, sines], 1)])
    used = torch.arange(len(whole)) != len(waves)  # the sine of 0
    return whole[used][:, used] + _RIDGE * torch.eye(len(whole) - 1, dtype=whole.dtype)


def _mean_turn(frequencies: Tensor, count: int) -> Tensor:
    """The mean of exp(i p f) over the positions p below `count`, in closed form. frequencies: float64"""
    half = frequencies / 2
    size = torch.where(half == 0, 1.0, (count * half).sin() / (count * half.sin()))
    return size * torch.exp(1j * (count - 1) * half)
