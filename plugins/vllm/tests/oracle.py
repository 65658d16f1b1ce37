"""The same model in transformers, each KV head of each layer under its own mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from kvpolicy_vllm.layout import BlockLayout
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Oracle:
    """Greedy tokens and their log-probabilities, with a forward over everything for each token."""

    def __init__(self, folder: str, layouts: list[BlockLayout] | None) -> None:
        """layouts: one for each layer; None attends to everything."""
        self.layouts = layouts
        ALL_ATTENTION_FUNCTIONS.register("oracle", self._attend)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="oracle"
        ).eval()

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        at, group = torch.arange(query.shape[2]), query.shape[1] // key.shape[1]
        seen = (at <= at[:, None]).expand(key.shape[1], -1, -1)
        if self.layouts is not None:
            layout = self.layouts[module.layer_idx]
            seen = seen & ((at < layout.num_sink_tokens) | (at >= layout.oldest(at)[:, :, None]))
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mask = seen.repeat_interleave(group, 0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2), None

    @torch.no_grad()
    def log_probabilities(self, tokens: list[int]) -> Tensor:
        """[T, vocabulary], of the token behind each."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
