"""transformers: loading a model, reaching its attention, probing it, running it over a ragged cache."""

from __future__ import annotations

from kvpolicy.integrations.transformers.attachment import attach, detach
from kvpolicy.integrations.transformers.build import new_cache
from kvpolicy.integrations.transformers.cache import RaggedCache
from kvpolicy.integrations.transformers.conversation import generate
from kvpolicy.integrations.transformers.corpus import read_corpus
from kvpolicy.integrations.transformers.decode_runner import DecodeRunner
from kvpolicy.integrations.transformers.load import load_config, load_model
from kvpolicy.integrations.transformers.pace import Pace, cast_parameters, own_parameters, set_pace, weights_sha256
from kvpolicy.integrations.transformers.probe import TransformersProbe
from kvpolicy.integrations.transformers.prompt_probe import PromptProbe
from kvpolicy.integrations.transformers.prompts import Prompts, prompt_cache
from kvpolicy.integrations.transformers.quantized import cache_nbytes, quantized_cache
from kvpolicy.integrations.transformers.repeat import repeat_context
from kvpolicy.integrations.transformers.save import load_cache
from kvpolicy.integrations.transformers.supply import attached, detached
from kvpolicy.integrations.transformers.versions import with_cache
from kvpolicy.integrations.transformers.weights import weights_of

__all__ = [
    "DecodeRunner",
    "Pace",
    "PromptProbe",
    "Prompts",
    "RaggedCache",
    "TransformersProbe",
    "attach",
    "attached",
    "cache_nbytes",
    "cast_parameters",
    "detach",
    "detached",
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
