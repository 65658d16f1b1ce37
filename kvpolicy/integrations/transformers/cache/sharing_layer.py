"""A layer that keeps no entries, though its model would have it: it attends over those of an earlier layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache.budgeted_layer import BudgetedLayer


class SharingLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """The layer of a model that `ModelSpec.sharing` names.

    owner: the layer whose entries it attends over
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, owner: BudgetedLayer) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The owner's keys and values in the place of these. key_states, value_states: [B, H, n, dim]"""
        return self.owner.reused(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.owner.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # transformers 5.17
        return -1
