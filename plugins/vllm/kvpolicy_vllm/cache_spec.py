"""What vLLM's memory manager is told of a layer: full attention, in blocks of another size in bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class BlockSpec(FullAttentionSpec):
    """`num_kv_heads` is the rows of a block, each a key and a value; `block_size` the tokens that it stands for."""

    @property
    def real_page_size_bytes(self) -> int:
        return int(self.num_kv_heads * 2 * self.head_size * get_dtype_size(self.dtype))


def register() -> None:
    """The stock manager of full attention serves the blocks."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(BlockSpec, FullAttentionManager, FullAttentionSpec)


def spec_of(layer: Any) -> BlockSpec:
    """The spec of one of our layers, a vLLM `Attention`."""
    rows, tokens_per_block = layer.impl.rows, layer.impl.serving.tokens_per_block
    # from 0.32 on a page is heads by states, each of them a number of tokens; here a row is a head with one state
    packed = {"num_head_slots": rows, "tokens_per_state": tokens_per_block}
    known = {field.name for field in fields(FullAttentionSpec)}
    return BlockSpec(
        block_size=tokens_per_block,
        num_kv_heads=rows,
        head_size=layer.head_size,
        head_size_v=layer.head_size_v,
        dtype=layer.kv_cache_torch_dtype,
        **{name: value for name, value in packed.items() if name in known},
    )
