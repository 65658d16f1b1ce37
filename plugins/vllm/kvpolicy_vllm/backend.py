"""vLLM's side: a backend whose cache is a block of ragged entries, its metadata, and the layer that attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)

from kvpolicy_vllm.attend import BlockAttention
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.report import pulse
from kvpolicy_vllm.self_check import check_attention
from kvpolicy_vllm.serving import Serving


class BlockBackend(AttentionBackend):
    """Blocks [rows, 2, head_size]; `num_kv_heads` is the rows of a block, whatever its tokens."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[BlockImpl]:
        return BlockImpl

    @staticmethod
    def get_builder_cls() -> type[BlockBuilder]:
        return BlockBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, 2, head_size


@dataclass(frozen=True, slots=True, eq=False)
class StepRequests:
    """The requests of one forward.

    counts: int [B], tokens of each with this forward's; 0 for none;  blocks: int [B, P]
    spans:  (first token of this forward, one behind its last, tokens of the request before), None for a step in which
        every request has one token
    """

    counts: Tensor
    blocks: Tensor
    spans: list[tuple[int, int, int]] | None


class BlockBuilder(AttentionMetadataBuilder[StepRequests]):
    """One for each distinct number of rows. Copies nothing and, in a step of single tokens, waits for nothing."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            layers[name].impl.start(device)
        check_attention(device, vllm_config.model_config.dtype)
        self.is_first = next(iter(layers)) in layer_names

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepRequests:
        step = common_attn_metadata
        spans = None
        if step.max_query_len > 1:
            begins, counts = step.query_start_loc_cpu.tolist(), step.seq_lens.tolist()
            spans = [
                (begin, end, count - (end - begin))
                for begin, end, count in zip(begins, begins[1:], counts, strict=False)
            ]
        if self.is_first:
            pulse.beat(step.num_reqs, step.num_actual_tokens)
        return StepRequests(step.seq_lens[: step.num_reqs], step.block_table_tensor[: step.num_reqs], spans)


class BlockImpl(AttentionImpl[StepRequests]):
    """One layer. `assign` says which of a plan's, `start` on which device."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        unknown = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "shared layers": kv_sharing_target_layer_name,
            **others,
        }
        for name, value in unknown.items():
            if value is not None:
                raise NotImplementedError(f"kvpolicy-vllm does not serve layers with {name}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or None
        self.slots: tuple[int, ...] = ()
        self.rows = 0
        self.serving: Serving | None = None
        self.attention: BlockAttention | None = None

    def assign(self, serving: Serving, layer: int, rank: int, tp_size: int) -> None:
        self.serving = serving
        self.slots, self.rows = serving.rank_slots(layer, rank, tp_size), serving.rows(layer, tp_size)

    def start(self, device: torch.device) -> None:
        if self.serving is None:
            raise RuntimeError("a layer of kvpolicy-vllm was started before it got its budget")
        layout = BlockLayout.of(
            self.slots,
            self.serving.tokens_per_block,
            self.serving.num_sink_tokens,
            max_tokens=self.serving.max_model_len,
            rows=self.rows,
            device=device,
        )
        self.attention = BlockAttention(layout, self.scale, self.softcap)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepRequests | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query: [N, num_heads, D]; key, value: [N, num_kv_heads, D]; kv_cache: [num_blocks, ...], rows of 2 D."""
        if attn_metadata is None:  # vLLM measures its memory
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("kvpolicy-vllm does not quantise the output of attention")
        if self.attention is None:
            raise RuntimeError("a layer of kvpolicy-vllm attends before it was started")
        step, attention = attn_metadata, self.attention
        cache = kv_cache.view(kv_cache.shape[0], -1, 2, self.head_size)  # from 0.32 on vLLM has a shape of its own
        out = output.view(-1, self.num_heads, self.head_size)
        if step.spans is None:
            n = len(step.counts)
            out[:n] = attention.decode(query[:n], key[:n], value[:n], cache, step.blocks, step.counts)
            return output
        single = [b for b, (begin, end, _) in enumerate(step.spans) if end - begin == 1]
        if single:
            at = torch.tensor([step.spans[b][0] for b in single], device=query.device)
            of = torch.tensor(single, device=query.device)
            out[at] = attention.decode(query[at], key[at], value[at], cache, step.blocks[of], step.counts[of])
        for b, (begin, end, before) in enumerate(step.spans):
            if end - begin > 1:
                q, k, v = query[begin:end], key[begin:end], value[begin:end]
                out[begin:end] = attention.chunk(q, k, v, cache, step.blocks[b], before)
        return output
