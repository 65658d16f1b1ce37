"""A transformers configuration as the fields of a `ModelSpec`, read by name: transformers itself is not imported."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvpolicy.errors import ModelError
from kvpolicy.model.layer_spec import LayerKind, LayerSpec

_KINDS: dict[str, LayerKind] = {
    "full_attention": "full",
    "attention": "full",
    "global": "full",
    "sliding_attention": "sliding",
    "local": "sliding",
    "chunked_attention": "chunked",
    # No keys and values that grow with the context:
    "cross_attention": "linear",
    "linear_attention": "linear",
    "mamba": "linear",
    "conv": "linear",
    "recurrent": "linear",
    "moe": "linear",
    "mlp": "linear",
}
_WINDOWS = {  # where a configuration says how far a layer of this type sees
    "sliding_attention": "sliding_window",
    "local": "window_size",
    "chunked_attention": "attention_chunk_size",
}
_UNSCALED = frozenset({"gemma3n_text", "gemma4_text"})  # queries are normalised instead; no attribute says it
_WITH_SINKS = frozenset({"gpt_oss", "granite_swa", "granitemoe_swa", "flint"})  # no attribute says it
# is_decoder = False, which makes an encoder of BERT, means nothing in these
_DECODERS = frozenset({"gpt_neox", "gpt_neox_japanese", "evolla", "EvollaModel"})


def spec_fields(config: Any) -> dict[str, Any]:
    """The fields of the spec of `config`: any object with the attribute names of a transformers configuration.

    Composite configurations (images, audio) are read at their text part.

    Raises `ModelError`, with the reason, where per-head budgets do not apply: encoder, encoder-decoder, bidirectional
    or latent (MLA) attention, no attention heads, a layer type that is not known, no full-attention layer.
    """
    text = _text_config(config)
    model_type = str(getattr(text, "model_type", None) or type(text).__name__)
    _refuse(config, text, model_type)
    types = _layer_types(text, model_type)
    shared = _shared_with(text, types, model_type)
    configs = getattr(text, "per_layer_config", None)
    configs = [text if configs is None else configs[index] for index in range(len(types))]
    made: dict[tuple[Any, ...], LayerSpec] = {}  # a configuration takes its time to answer, and most layers are alike
    for index, kind in enumerate(zip(map(id, configs), types, shared, strict=True)):
        if kind not in made:
            made[kind] = _layer(text, configs[index], index, types[index], shared[index], model_type)
    layers = tuple(made[kind] for kind in zip(map(id, configs), types, shared, strict=True))
    return {
        "model_type": model_type,
        "hidden_size": _whole(text, "hidden_size", model_type),
        "vocab_size": _whole(text, "vocab_size", model_type),
        "max_context": _max_context(text),
        "rope": _rope(text),
        "layers": layers,
    }


def _text_config(config: Any) -> Any:
    """The part of a composite configuration that describes the text decoder; else `config` itself."""
    if callable(getattr(config, "get_text_config", None)):
        try:
            return config.get_text_config(decoder=True)
        except ValueError as error:
            raise ModelError(f"the configuration of {type(config).__name__} has no single text part: {error}") from None
    text = getattr(config, "text_config", None)
    if isinstance(text, dict):
        return SimpleNamespace(**text)
    return config if text is None else text


def _refuse(config: Any, text: Any, model_type: str) -> None:
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ModelError(f"model type '{model_type}' is an encoder-decoder; kvpolicy budgets decoder-only models")
    if getattr(text, "is_decoder", None) is False and model_type not in _DECODERS:
        raise ModelError(
            f"model type '{model_type}' is an encoder (is_decoder = False): it reads in both directions and keeps no "
            "cache; kvpolicy budgets decoder-only models"
        )
    if callable(getattr(config, "get_text_config", None)) and not hasattr(text, "use_cache"):
        # transformers' own configuration; one that was only read from JSON may leave out what is the default
        raise ModelError(
            f"model type '{model_type}' keeps no cache (its configuration has no use_cache): an encoder, or a decoder "
            "that reads everything at each step; kvpolicy budgets decoder-only models"
        )
    ranks = [getattr(layer, "kv_lora_rank", None) for layer in getattr(text, "per_layer_config", None) or [text]]
    if any(ranks):
        raise ModelError(
            f"model type '{model_type}' has latent attention (MLA, kv_lora_rank = {max(x or 0 for x in ranks)}): it "
            "caches one latent vector per token, not keys and values per head, so there are no KV heads to budget"
        )
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise ModelError(f"model type '{model_type}' attends in both directions; kvpolicy needs causal attention")
    if not getattr(text, "num_attention_heads", None):
        raise ModelError(f"model type '{model_type}' has no attention heads (num_attention_heads), so no KV cache")


def _whole(text: Any, name: str, model_type: str) -> int:
    value = getattr(text, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"the configuration of model type '{model_type}' has {name} = {value!r}, expected a positive integer"
        )
    return value


def _max_context(text: Any) -> int:
    return int(getattr(text, "max_position_embeddings", None) or 0)


def _layer_types(text: Any, model_type: str) -> list[str]:
    """One type per layer, by transformers' own rules for configurations that do not list them."""
    count = _whole(text, "num_hidden_layers", model_type)
    names = ("layer_types", "layers_block_type", "attention_layers")
    listed = next((value for name in names if (value := getattr(text, name, None)) is not None), None)
    if listed is None:
        windowed = [name for name in ("sliding_attention", "chunked_attention") if _window(text, name) is not None]
        listed = [*windowed, "full_attention"][:1] * count
    if len(listed) != count:
        raise ModelError(
            f"the configuration of model type '{model_type}' lists {len(listed)} layer types for {count} layers"
        )
    crossing = getattr(text, "cross_attention_layers", None) or ()  # Mllama: these read the image, not the text
    return ["cross_attention" if index in crossing else str(name) for index, name in enumerate(listed)]


def _window(config: Any, layer_type: str) -> int | None:
    """Tokens that a layer of this type sees, None for all of them."""
    if layer_type not in _WINDOWS or getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, _WINDOWS[layer_type], None) or None


def _shared_with(text: Any, types: Sequence[str], model_type: str) -> list[int | None]:
    """For each layer the one whose keys and values it reuses: the last of the same type that owns its own."""
    owners = len(types) - int(getattr(text, "num_kv_shared_layers", None) or 0)
    shared: list[int | None] = [None] * len(types)
    for index in range(max(owners, 0), len(types)):
        same = [earlier for earlier in range(owners) if types[earlier] == types[index]]
        if not same:
            raise ModelError(
                f"layer {index} of model type '{model_type}' shares keys and values, but no layer before "
                f"{owners} is of its type '{types[index]}'"
            )
        shared[index] = same[-1]
    return shared


def _layer(text: Any, layer: Any, index: int, layer_type: str, shared: int | None, model_type: str) -> LayerSpec:
    """layer: the configuration as this layer sees it; the same for every layer in most models"""
    kind = _KINDS.get(layer_type)
    if kind is None:
        raise ModelError(
            f"layer {index} of model type '{model_type}' is of type '{layer_type}', which kvpolicy does not know; "
            f"it knows {', '.join(sorted(_KINDS))}"
        )
    window = _window(layer, layer_type)
    if window is None and layer_type in _WINDOWS:
        name = _WINDOWS[layer_type]
        raise ModelError(f"layer {index} of model type '{model_type}' is of type '{layer_type}' but {name} is not set")
    if window is not None and 0 < _max_context(text) <= window:
        kind, window = "full", None  # no token within the model's context is ever out of sight
    num_q_heads = _whole(layer, "num_attention_heads", model_type)
    num_kv_heads, head_dim = _key_shape(text, layer, kind, num_q_heads, model_type)
    if num_q_heads % num_kv_heads:
        raise ModelError(
            f"layer {index} of model type '{model_type}' has {num_q_heads} query heads, which do not divide into "
            f"{num_kv_heads} KV heads"
        )
    return LayerSpec(
        kind=kind,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        key_dim=head_dim,
        value_dim=int(getattr(layer, "v_head_dim", None) or head_dim),
        window=window,
        softcap=getattr(layer, "attn_logit_softcapping", None),
        sinks=model_type in _WITH_SINKS,
        shared_with=shared,
        scale=_scale(layer, model_type),
    )


def _scale(layer: Any, model_type: str) -> float | None:
    """The factor on attention scores where it is not head_dim ** -0.5."""
    if model_type in _UNSCALED:
        return 1.0
    if getattr(layer, "query_pre_attn_scalar", None):
        return 1 / math.sqrt(layer.query_pre_attn_scalar)
    multiplier: float | None = getattr(layer, "attention_multiplier", None)
    return float(multiplier) if multiplier else None


def _key_shape(text: Any, layer: Any, kind: LayerKind, num_q_heads: int, model_type: str) -> tuple[int, int]:
    """KV heads and head dimension of one layer."""
    heads = getattr(layer, "num_key_value_heads", None)
    if heads is None:
        heads = 1 if getattr(layer, "multi_query", False) else num_q_heads
    head_dim = getattr(layer, "head_dim", None) or _whole(layer, "hidden_size", model_type) // num_q_heads
    if kind == "full" and getattr(text, "per_layer_config", None) is None:
        # Gemma 4 as its configuration was before transformers resolved it per layer
        head_dim = getattr(text, "global_head_dim", None) or head_dim
        if getattr(text, "attention_k_eq_v", False):
            heads = getattr(text, "num_global_key_value_heads", None) or heads
    return int(heads), int(head_dim)


def _rope(text: Any) -> str:
    """The parameters of the position embedding as one canonical text."""
    parameters = getattr(text, "rope_parameters", None)
    if parameters is None:
        names = ("rope_theta", "rope_scaling", "partial_rotary_factor")
        parameters = {name: getattr(text, name) for name in names if getattr(text, name, None) is not None}
    return json.dumps(parameters, sort_keys=True, default=str)
