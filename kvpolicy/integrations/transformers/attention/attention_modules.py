"""Where in a model its attention is, and where that computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpolicy.errors import ModelError


def attention_modules(model: PreTrainedModel, layers: Sequence[int]) -> list[tuple[nn.Module, nn.Module]]:
    """(attention module, decoder layer) of each of these model layers, in order.

    Raises `ModelError` when a layer's attention module is not found or not unique.
    """
    modules = dict(model.named_modules())
    candidates: dict[int, list[str]] = {}
    for name, module in modules.items():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "attention" in type(module).__name__.lower():
            candidates.setdefault(index, []).append(name)
    pairs = []
    for index in layers:
        names = candidates.get(index, [])
        # a decoder layer may be called after its attention and count layers too (Mllama): the innermost is meant
        names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
        if len(names) != 1:
            raise ModelError(
                f"{type(model).__name__}: layer {index} has {len(names)} attention modules that kvpolicy recognises "
                "(expected 1): this architecture is not supported"
            )
        parent = names[0].rpartition(".")[0]
        pairs.append((modules[names[0]], modules[parent]))
    return pairs


def decoder_layers(model: nn.Module, block: nn.Module) -> list[nn.Module]:
    """All decoder layers, whatever their kind: the list in which this one lies; this one alone where there is none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(child is block for child in module):
            return list(module)
    return [block]


def device_of(part: nn.Module) -> torch.device:
    """Where a part of a model computes, also where accelerate moves its weights."""
    device = next(part.parameters()).device
    if device.type == "meta":  # offloaded: accelerate brings the weights to where they are used
        for module in part.modules():
            execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if execution is not None:
                return torch.device(execution)
    return device
