"""Leaving out the logits that nobody reads: of a long prompt they are larger than its cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def keep_logits(model: PreTrainedModel, which: int | Tensor = 1) -> dict[str, Any]:
    """Keyword arguments that make a forward compute the logits of these tokens alone; none where it cannot.

    which: how many of the last tokens, or int64 [n], their places

    Whoever reads them counts from the end, which is right in both cases.
    """
    return {"logits_to_keep": which} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
