"""transformers: loading a model, reaching its attention, probing it."""

from __future__ import annotations

from kvpolicy.integrations.transformers.corpus import read_corpus
from kvpolicy.integrations.transformers.load import load_config, load_model, parameter_count
from kvpolicy.integrations.transformers.pace import Pace, cast_parameters, set_pace, weights_sha256
from kvpolicy.integrations.transformers.probe import TransformersProbe

__all__ = [
    "Pace",
    "TransformersProbe",
    "cast_parameters",
    "load_config",
    "load_model",
    "parameter_count",
    "read_corpus",
    "set_pace",
    "weights_sha256",
]
