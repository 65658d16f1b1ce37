"""transformers: loading a model, reaching its attention, probing it, running it over a ragged cache."""

from __future__ import annotations

from kvpolicy.integrations.transformers.attention.attachment import attach, detach
from kvpolicy.integrations.transformers.cache.build import new_cache
from kvpolicy.integrations.transformers.cache.contexts import attached, detached
from kvpolicy.integrations.transformers.cache.conversation import generate
from kvpolicy.integrations.transformers.cache.decode_runner import DecodeRunner
from kvpolicy.integrations.transformers.cache.load_saved import load_cache
from kvpolicy.integrations.transformers.cache.quantized import cache_nbytes, quantized_cache
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.cache.repeat import repeat_context
from kvpolicy.integrations.transformers.cache.slot_runner import SlotRunner
from kvpolicy.integrations.transformers.model.dtype import (
    Pace,
    cast_parameters,
    own_parameters,
    set_pace,
    weights_sha256,
)
from kvpolicy.integrations.transformers.model.encoded_text import read_corpus
from kvpolicy.integrations.transformers.model.load import load_config, load_model
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.integrations.transformers.model.weights import activations_of, weights_of
from kvpolicy.integrations.transformers.probes.base import SequenceProbe
from kvpolicy.integrations.transformers.probes.layer_sharing import LayerSharing, find_sharing
from kvpolicy.integrations.transformers.probes.prefilled import Prompts, prompt_cache
from kvpolicy.integrations.transformers.probes.prompt import PromptProbe
from kvpolicy.integrations.transformers.probes.window import TransformersProbe

__all__ = [
    "DecodeRunner",
    "LayerSharing",
    "Pace",
    "PromptProbe",
    "Prompts",
    "RaggedCache",
    "SequenceProbe",
    "SlotRunner",
    "TransformersProbe",
    "activations_of",
    "attach",
    "attached",
    "cache_nbytes",
    "cast_parameters",
    "detach",
    "detached",
    "find_sharing",
    "generate",
    "load_cache",
    "load_config",
    "load_model",
    "new_cache",
    "own_parameters",
    "prompt_cache",
    "quantized_cache",
    "read_corpus",
    "repeat_context",
    "set_pace",
    "weights_of",
    "weights_sha256",
    "with_cache",
]
