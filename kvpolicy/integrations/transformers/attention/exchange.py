"""The name in a model's configuration by which transformers finds its attention and mask functions."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kvpolicy.errors import ModelError


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
