"""What the keys of a head have in common: their bias, turned by position.

Keys are `RoPE(W x + b)`. Some models' biases are many times as large as what tells keys apart (Qwen2.5's are), and
codes of few bits would be spent on them. Pairs of channels that turn slowly keep their bias about where it is, and
those that turn fast have little. So the few pairs that are far from their mean turn with the position, and the others
take the mean.
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
from kvpolicy.integrations.transformers.attention.rotary import find_rotary, rotary_of
from kvpolicy.model.spec import ModelSpec

PAIRS = 8
"""Pairs of channels of each head that turn."""
POSITIONS = 4096
"""Over so many the mean is taken."""
REACH = 32768
"""Over so many a pair is far from its mean or not."""
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
    return [
        None if bias is None else _kept(bias, attention) for attention, bias in zip(attentions, biases, strict=True)
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


def _kept(bias: Tensor, attention: nn.Module) -> KeyCentre:
    """The centre, which all caches of a model share, as they do its weights."""
    weights = bias.data_ptr(), bias._version
    if attention not in _CENTRES or _CENTRES[attention][0] != weights:
        _CENTRES[attention] = weights, _centre(bias, attention)
    return _CENTRES[attention][1]


def _centre(bias: Tensor, attention: nn.Module) -> KeyCentre:
    """bias: [H, D]"""
    bias, rotary = bias.float(), rotary_of(attention)
    frequencies = rotary.frequencies.double()
    size = bias[:, rotary.first].square() + bias[:, rotary.second].square()
    far = size * (1 - _mean_turn(frequencies, REACH).abs().square())
    pairs = far.topk(min(PAIRS, len(frequencies)), -1).indices  # [H, J]
    channels = torch.stack([rotary.first, rotary.second], -1)[pairs]
    # [H, J, D], each pair alone, and a quarter of a circle further
    turning = torch.zeros(*pairs.shape, bias.shape[1], device=bias.device).scatter(-1, channels, 1.0) * bias[:, None]
    quarter = rotary.turned(turning, torch.zeros_like(rotary.frequencies), torch.ones_like(rotary.frequencies))
    mean = _mean_turn(frequencies, POSITIONS)
    still = rotary.turned(bias - turning.sum(1), mean.real.float(), mean.imag.float())
    waves = torch.stack([turning, quarter], 2).flatten(1, 2)
    return KeyCentre(
        torch.cat([still[:, None], waves], 1).transpose(0, 1).contiguous(),
        (frequencies * (CIRCLE / (2 * torch.pi))).round().to(torch.int32)[pairs],
    )


def _mean_turn(frequencies: Tensor, count: int) -> Tensor:
    """The mean of exp(i p f) over the positions p below `count`, in closed form. frequencies: float64 [P]"""
    half = frequencies / 2
    size = torch.where(half == 0, 1.0, (count * half).sin() / (count * half.sin()))
    return size * torch.exp(1j * (count - 1) * half)
