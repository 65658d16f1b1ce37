"""What a model's weights weigh, from its configuration alone: nothing is loaded or allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.model.quiet import quiet

_MXFP4_BITS = 4 + 8 / 32  # a scale of 8 bits for 32 numbers


@dataclass(frozen=True, slots=True)
class Weights:
    """nbytes: of the parameters;  note: what this leaves out or takes for granted, or None."""

    nbytes: int
    note: str | None = None


def weights_of(config: Any, itemsize: int) -> Weights:
    """The weights of the causal language model with this configuration. itemsize: bytes of an unquantised number.

    Raises `ModelError` where transformers has no such model.
    """
    model, note = _empty(config)
    method = _quantization(config).get("quant_method")
    if method == "mxfp4":
        note = "mxfp4 as in the checkpoint; without kernels for it transformers expands them"
    elif method:
        note = f"as if not quantised with {method}"
    bits = 8 * itemsize
    # mxfp4 is for the experts, which are stacked in a third dimension
    sizes = [(_MXFP4_BITS if method == "mxfp4" and x.dim() == 3 else bits) * x.numel() for x in model.parameters()]
    return Weights(round(sum(sizes) / 8), note)


def activations_of(config: Any, itemsize: int) -> int:
    """Bytes for each token of a prompt that one forward holds at its largest, besides weights and caches.

    That is in a gated feed-forward block: its three wide tensors, four of the hidden size, the rotary tables. Counted
    so on Llama, Mistral and Qwen2; a fused gate (Phi-3) holds a third more there. Logits are those of the last token.
    itemsize: bytes of a number
    """
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    routed = getattr(text, "moe_intermediate_size", None), getattr(text, "num_experts_per_tok", None)
    if None not in routed:
        wide = int(routed[0]) * int(routed[1])  # type: ignore[arg-type]  # just checked
    else:
        wide = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    head = int(getattr(text, "head_dim", None) or hidden // text.num_attention_heads)
    return itemsize * (3 * wide + 4 * hidden + 2 * head) + 8  # and its position


def _empty(config: Any) -> tuple[PreTrainedModel, str | None]:
    """The model without memory; its text part where the whole cannot be made. And what is missing then."""
    failure: Exception | None = None
    for part, note in ((config, None), (config.get_text_config(decoder=True), "of the text part alone")):
        try:
            with quiet(), torch.device("meta"):
                return AutoModelForCausalLM.from_config(part), note
        except (ImportError, ValueError) as error:  # a package for images or sound; no language model of this type
            failure = error
    raise ModelError(
        f"transformers has no causal language model of type '{config.model_type}' to weigh "
        f"({(str(failure).strip().splitlines() or [''])[0]})"
    )


def _quantization(config: Any) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None) or {}
    return quantization if isinstance(quantization, dict) else quantization.to_dict()
