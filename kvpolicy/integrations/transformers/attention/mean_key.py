"""The keys of a head before they are turned by position: their mean, and how far they lie from it.

Most of the energy of keys may lie in their mean (86 % in SmolLM2), and where keys have a large bias, as Qwen2.5's,
nearly all. It is taken over one forward of a few tokens, drawn as often as words are in a language: what it is used for
does not have to be exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall
from kvpolicy.integrations.transformers.attention.attention_modules import device_of
from kvpolicy.integrations.transformers.attention.exchange import text_config
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.integrations.transformers.attention.rotary import rotary_of
from kvpolicy.integrations.transformers.model.logits import keep_logits

TOKENS = 256
_SINKS = 8  # the first tokens' keys are unlike all others
_SEED, _BYTES = 21, 256


class MeanKey(NamedTuple):
    """Of the KV heads of a layer.

    mean:   float32 [H, D]
    spread: the square of a key's distance to it, the sum over channels and heads, on average
    """

    mean: Tensor
    spread: float


def mean_keys(model: PreTrainedModel, attentions: Sequence[nn.Module]) -> list[MeanKey]:
    """Of these layers, whose rotations `find_rotary` has found. Runs the model on the tokens of `sample_ids`."""
    found: dict[nn.Module, MeanKey] = {}

    def note(call: AttentionCall) -> Answer:
        keys, rotary = call.key[0].detach().float(), rotary_of(call.module)
        positions = torch.arange(keys.shape[1], device=rotary.frequencies.device)
        angles = (-positions[:, None].double() * rotary.frequencies).to(keys.device)
        keys = rotary.turned(keys, angles.cos().float(), angles.sin().float())[:, _SINKS:]
        mean = keys.mean(1)
        found[call.module] = MeanKey(mean, float((keys - mean[:, None]).square().sum((0, 2)).mean()))
        return call.stock()

    with torch.no_grad(), intercepted(model, dict.fromkeys(attentions, note)):
        model(input_ids=sample_ids(model), use_cache=False, **keep_logits(model))
    return [found[attention] for attention in attentions]


def sample_ids(model: PreTrainedModel) -> Tensor:
    """int64 [1, TOKENS], by Zipf's law: vocabularies begin with single bytes, and go by frequency then, nearly."""
    vocabulary: int = text_config(model).vocab_size
    first = min(_BYTES, vocabulary // 2)
    drawn = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(_SEED))
    return (first * torch.exp(drawn * math.log(vocabulary / first))).long().to(device_of(model))
