"""The transformers model inside what was put around it: torch.compile, peft, DataParallel."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpolicy.errors import ModelError

_INSIDE = ("_orig_mod", "base_model", "model", "module")
"""Where torch.compile, peft, its tuners and DataParallel keep what they are around."""


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model whose forward runs in the end, and whose attention can be exchanged.

    Raises `ModelError` for what is no model of transformers, and for peft's prompt learning: it puts virtual tokens in
    front of a prompt, which nobody who counts tokens can tell from the prompt's own.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        adapter = getattr(inner, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ModelError(
                f"this {type(model).__name__} puts virtual tokens in front of each prompt "
                f"({adapter.peft_type.value.lower()}), and a cache cannot tell them from the prompt's own: use an "
                "adapter that changes weights, such as LoRA, or the base model"
            )
        modules = (getattr(inner, "_modules", {}).get(name) for name in _INSIDE)
        inside = next((module for module in modules if module is not None), None)
        if inside is None:
            raise ModelError(
                f"got a {type(model).__name__}, expected a model of transformers, or one inside torch.compile, peft or "
                "DataParallel"
            )
        inner = inside
    return inner
