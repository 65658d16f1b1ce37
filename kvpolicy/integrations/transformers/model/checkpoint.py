"""Whether a checkpoint fills the model of its configuration. transformers draws at random what it lacks."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel

from kvpolicy.errors import ModelError

_NAMED = 3  # tensors that a message names of each kind


def check_filled(model: PreTrainedModel, info: dict[str, Any], origin: str) -> None:
    """Raises `ModelError`, naming tensors, where weights were drawn at random or left lying.

    info:   what `from_pretrained(output_loading_info=True)` gives; ties and buffers that may be absent are not in it
    origin: where the checkpoint was found, in words
    """
    reshaped = {name: f"{name} {list(has)} for {list(wants)}" for name, has, wants in info["mismatched_keys"]}
    wrong = {
        "lacks": set(info["missing_keys"]) - set(reshaped),
        "has in another shape": set(reshaped.values()),
        "has beyond its configuration": _of_its_modules(model, info["unexpected_keys"]),
    }
    reasons = [f"{how} {_some(names)}" for how, names in wrong.items() if names] or info["error_msgs"][:1]
    if reasons:
        raise ModelError(f"{origin} does not hold the model of its configuration: it {'; it '.join(reasons)}")


def _of_its_modules(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Those that would go into a module such as the model has, of whatever layer: a layer too many, or a bias.

    The others belong to parts that a causal language model is loaded without, such as an encoder of images.
    """
    own = {_module(name) for name in model.state_dict()}
    return {name for name in names if _module(name) in own}


def _module(tensor: str) -> str:
    """The name of a tensor's module, the same for all layers."""
    return re.sub(r"\.\d+\.", ".*.", tensor.rpartition(".")[0] + ".")


def _some(names: set[str]) -> str:
    first = sorted(names)[:_NAMED]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
