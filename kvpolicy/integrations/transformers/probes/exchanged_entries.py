"""Layers that attend over the entries of an earlier one in a plain forward, as a cache has them do it (KVSharer)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall, Handler
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.model.spec import ModelSpec


def exchanging(
    model: PreTrainedModel, spec: ModelSpec, shared_layers: Mapping[int, int], handlers: Mapping[nn.Module, Handler]
) -> dict[nn.Module, Handler]:
    """These handlers, for attention in which layers that share are handed the other layer's keys and values.

    spec: the model's, with `shared_layers`
    """
    owner_of = {layer: spec.layers[layer].shared_with for layer in shared_layers}
    owners = sorted({owner for owner in owner_of.values() if owner is not None})
    numbers = [*owners, *owner_of]
    modules = {layer: module for layer, (module, _) in zip(numbers, attention_modules(model, numbers), strict=True)}
    entries: dict[int, tuple[Tensor, Tensor]] = {}

    def answered(module: nn.Module, call: AttentionCall) -> Answer:
        handler = handlers.get(module)
        return call.stock() if handler is None else handler(call)

    def keeping(layer: int) -> Handler:
        def keep(call: AttentionCall) -> Answer:
            entries[layer] = call.key, call.value
            return answered(modules[layer], call)

        return keep

    def taking(layer: int, owner: int) -> Handler:
        def take(call: AttentionCall) -> Answer:
            key, value = entries[owner]
            return answered(modules[layer], replace(call, key=key, value=value))

        return take

    exchanged = {modules[owner]: keeping(owner) for owner in owners}
    exchanged |= {modules[layer]: taking(layer, owner) for layer, owner in owner_of.items() if owner is not None}
    return {**handlers, **exchanged}
