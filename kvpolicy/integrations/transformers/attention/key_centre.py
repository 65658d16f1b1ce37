"""What the keys of a head have in common: their bias, turned by position.

Keys are `RoPE(W x + b)`. Some models' biases are many times as large as what tells keys apart (Qwen2.5's are), and
codes of few bits would be spent on them. At a position p the turned bias is a sum of one wave for each pair of
channels. Few waves are enough for all of them: pairs that turn fast have little, and those that turn slowly look alike
over the positions there are. So each head has the few frequencies, of its own, whose waves and a constant come nearest
to its turned bias, by least squares.
"""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary, WeakSet

import torch
from kvpolicy_kernels.key_centre import CIRCLE, KeyCentre
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.errors import FormatWarning, ModelError
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.exchange import text_config
from kvpolicy.integrations.transformers.attention.rotary import find_rotary, rotary_of
from kvpolicy.model.spec import ModelSpec

WAVES = 8
"""Frequencies of each head."""
NEAR, REACH = 4096, 32768
"""Positions that count: each doubling from `NEAR` on to what the model was made for, or to `REACH`, as much."""
_RIDGE = 1e-6  # so that waves which are all but the same do not take each other off
_FUSED = ("qkv_proj", "query_key_value", "qkv", "Wqkv", "c_attn")
_TOLD: WeakSet[nn.Module] = WeakSet()
_CENTRES: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], KeyCentre]] = WeakKeyDictionary()


def key_centres(model: PreTrainedModel, spec: ModelSpec) -> list[KeyCentre | None]:
    """Of each budgeted layer, for the KV heads held here; None where keys have no bias, or one that is not known.

    It is known of a projection `k_proj` with nothing behind it but a rotation that `find_rotary` knows. Warns, with
    `FormatWarning` and once for a model, of a bias that is not known.
    """
    attentions = [attention for attention, _ in attention_modules(model, spec.budgeted_layers)]
    biases: list[Tensor | None] = []
    unknown = None
    for attention in attentions:
        try:
            biases.append(_bias(attention, spec.attention.key_dim))
        except ModelError as error:
            biases.append(None)
            unknown = error
    try:
        find_rotary(model, [attention for attention, bias in zip(attentions, biases, strict=True) if bias is not None])
    except ModelError as error:
        biases, unknown = [None] * len(attentions), error
    if unknown is not None and model not in _TOLD:
        _TOLD.add(model)
        warnings.warn(_encoded_whole(model, unknown), FormatWarning, stacklevel=2)
    reach = getattr(text_config(model), "max_position_embeddings", None) or REACH
    return [
        None if bias is None else _kept(bias, attention, reach)
        for attention, bias in zip(attentions, biases, strict=True)
    ]


def _encoded_whole(model: PreTrainedModel, why: ModelError) -> str:
    return (
        f"{type(model).__name__}: keys have a bias that cannot be taken off before they are encoded "
        f"({str(why).partition(':')[0]}). Where it is large, as Qwen2.5's is, 'int4' loses most of the quality, and "
        "'int8' some: use format='model', or measure the loss, as `kvpolicy compare full full@int8 full@int4` does"
    )


def _bias(attention: nn.Module, key_dim: int) -> Tensor | None:
    """[H, D], of the KV heads held here; None without a bias. Raises `ModelError` for one that cannot be read."""
    if getattr(attention, "k_norm", None) is not None:
        return None
    for name in _FUSED:
        if isinstance(getattr(getattr(attention, name, None), "bias", None), Tensor):
            raise ModelError(f"it is a part of {type(attention).__name__}.{name}'s")
    projection = getattr(attention, "k_proj", None)
    bias = getattr(projection, "bias", None)
    if not isinstance(bias, Tensor):
        return None
    if bias.is_meta:  # offloaded: accelerate brings it for the forward, from where it is
        weights = getattr(getattr(projection, "_hf_hook", None), "weights_map", None)
        if weights is None:
            raise ModelError("it is on the meta device, and accelerate does not know where else")
        bias = weights["bias"]
    if hasattr(bias, "to_local"):  # under tensor parallelism
        bias = bias.to_local()
    if not bias.numel() or bias.numel() % key_dim:
        raise ModelError(f"it has {bias.numel()} numbers, no multiple of the head dim {key_dim}")
    return bias.detach().view(-1, key_dim)


def _kept(bias: Tensor, attention: nn.Module, reach: int) -> KeyCentre:
    """The centre, which all caches of a model share, as they do its weights."""
    weights = bias.data_ptr(), bias._version
    if attention not in _CENTRES or _CENTRES[attention][0] != weights:
        _CENTRES[attention] = weights, _centre(bias, attention, reach)
    return _CENTRES[attention][1]


def _centre(bias: Tensor, attention: nn.Module, reach: int) -> KeyCentre:
    """bias: [H, D]. Worked out on the CPU, where the same model gives the same everywhere."""
    rotary = rotary_of(attention)
    own, frequencies = bias.double().cpu(), rotary.frequencies.double().cpu()
    first, second = rotary.first.cpu(), rotary.second.cpu()
    count = len(frequencies)
    # functions of the position, M of them: 1, the cosines, the sines
    cosines, sines = torch.arange(1, count + 1), torch.arange(count + 1, 2 * count + 1)
    turned = own.new_zeros(*own.shape, 1 + 2 * count)  # [H, D, M], the turned bias as a sum of them
    turned[..., 0] = own
    turned[:, torch.cat([first, second]), 0] = 0
    turned[:, first, cosines], turned[:, first, sines] = own[:, first], -own[:, second]
    turned[:, second, cosines], turned[:, second, sines] = own[:, second], own[:, first]
    products = _products(frequencies, reach)
    waves = _nearest(turned, products)
    used = torch.stack([cosines[waves], sines[waves]], -1).flatten(1)
    used = torch.cat([used.new_zeros(len(used), 1), used], 1)  # [H, 1 + 2 J]
    among = products[used]
    coefficients = torch.linalg.solve(_columns(among, used), among @ turned.mT)
    return KeyCentre(
        coefficients.transpose(0, 1).float().contiguous().to(bias.device),
        (frequencies * (CIRCLE / (2 * torch.pi))).round().to(torch.int32)[waves].to(bias.device),
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
