"""Where the layers of a model compute, also where accelerate moves them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules, decoder_layers, device_of
from kvpolicy.model.spec import ModelSpec


def layer_devices(model: PreTrainedModel, spec: ModelSpec) -> list[torch.device]:
    """The device of each decoder layer's keys and values. Raises `ModelError` where the layers are not found."""
    layers = decoder_layers(model, attention_modules(model, spec.budgeted_layers[:1])[0][1])
    if len(layers) != len(spec.layers):
        raise ModelError(f"{type(model).__name__}: kvpolicy does not recognise its list of decoder layers")
    return [device_of(layer) for layer in layers]


def check_devices(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Raises `ModelError` where a layer computes on another device than the budgeted one whose entries it reuses.

    The keys that it gets there are a copy, which does not say which cache they belong to.
    """
    shared = [(index, owner) for index, layer in enumerate(spec.layers) if (owner := layer.shared_with) is not None]
    shared = [(index, owner) for index, owner in shared if owner in spec.budgeted_layers]
    devices = layer_devices(model, spec) if shared else []
    for index, owner in shared:
        if devices[index] != devices[owner]:
            raise ModelError(
                f"layer {index} is on {devices[index]} and reuses the keys and values of layer {owner} on "
                f"{devices[owner]}: give a device_map that puts both on one device"
            )
