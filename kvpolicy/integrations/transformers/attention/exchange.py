"""Putting an attention function of ours where transformers looks one up, without touching a model's code.

transformers finds a model's attention and mask functions by the name in its configuration. A name of ours stands for
the pair (prefix, base): the base is what the model used before, and what our function falls back to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.errors import ModelError

Attention = Callable[..., tuple[Tensor, Any]]


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model, also of a vision-language model."""
    return model.config.get_text_config(decoder=True)


def attention_name(model: PreTrainedModel) -> str:
    """The implementation that the language model uses now."""
    name: str = text_config(model)._attn_implementation
    return name


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the implementation of the language model alone; a vision or audio part keeps its own.

    Raises `ModelError` for a model whose attention cannot be exchanged, or is not causal.
    """
    text = text_config(model)
    _check_causal(model, text)
    keys = [key for key in getattr(model.config, "sub_configs", {}) if getattr(model.config, key, None) is text]
    model.set_attn_implementation({keys[0]: name} if keys else name)
    if text._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} does not let its attention be exchanged (it does not go through transformers' "
            "AttentionInterface); kvpolicy cannot measure or compress it"
        )


def _check_causal(model: PreTrainedModel, text: Any) -> None:
    """Raises `ModelError` for an encoder: not every configuration says that it is one."""
    for module in model.modules():
        own = getattr(module, "config", None) is text and isinstance(getattr(module, "layer_idx", None), int)
        if own and getattr(module, "is_causal", None) is False:
            raise ModelError(
                f"{type(module).__name__} of {type(model).__name__} reads in both directions: an encoder keeps no "
                "cache; kvpolicy budgets decoder-only models"
            )


def register(name: str, base: str, attention: Attention, mask: Callable[..., Any]) -> None:
    """Registers a pair of functions under `name`, once. Raises `ModelError` for a base that transformers lacks."""
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ModelError(f"the attention implementation '{base}' is unknown to transformers; use 'sdpa'")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def as_stock(out: Tensor) -> Tensor:
    """[B, num_q_heads, n, Dv] to what attention functions of transformers return."""
    return out.transpose(1, 2).contiguous()


def stock_attention(base: str, module: nn.Module) -> Attention:
    """The function the model would have called; "eager" is defined beside each model."""
    if base == "eager":
        function: Attention = sys.modules[type(module).__module__].eager_attention_forward
        return function
    chosen: Attention = ALL_ATTENTION_FUNCTIONS[base]
    return chosen
