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

from kvpolicy import registry
from kvpolicy_vllm.attend import BlockAttention
from kvpolicy_vllm.cuts import CutAttention, CutLayout
from kvpolicy_vllm.layout import BlockLayout
from kvpolicy_vllm.observation import Observation
from kvpolicy_vllm.recorded import RecordedWork
from kvpolicy_vllm.report import pulse
from kvpolicy_vllm.self_check import check_attention, check_cuts
from kvpolicy_vllm.serving import Serving
from kvpolicy_vllm.steps import LayerStep, LayerTables


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

    at:     int [B], which of the forward's tokens are the only ones of their request; None for the first B
    counts: int [B], tokens of each of these requests with this forward's; 0 for none;  blocks: int [B, P]
    chunks: (first token of this forward, one behind its last, tokens of the request before, blocks [P]) of the others
    """

    at: Tensor | None
    counts: Tensor
    blocks: Tensor
    chunks: list[tuple[int, int, int, Tensor]]

    @classmethod
    def read(cls, step: Any) -> StepRequests:
        """step: vLLM's metadata. Nothing waits for the device, and in a step of single tokens nothing is copied."""
        lengths, blocks = step.seq_lens[: step.num_reqs], step.block_table_tensor[: step.num_reqs]
        if step.max_query_len == 1:
            return cls(None, lengths, blocks, [])
        begins, counts = step.query_start_loc_cpu.tolist(), _counts(step)
        singles, chunks = [], []
        for request, (begin, end, count) in enumerate(zip(begins, begins[1:], counts, strict=False)):
            if end - begin == 1:
                singles.append((begin, request))
            elif end > begin:
                chunks.append((begin, end, count - (end - begin), blocks[request]))
        table = torch.tensor(singles, dtype=torch.int64, pin_memory=blocks.is_cuda).view(-1, 2)
        at, of = table.to(blocks.device, non_blocking=True).unbind(1)
        return cls(at, lengths[of], blocks[of], chunks)


def _counts(metadata: Any) -> list[int]:
    """Tokens of each request with this forward's. Waits for the device where vLLM does not know them on the host."""
    known = metadata.seq_lens_cpu_upper_bound  # exact, because nothing is drafted
    counts: list[int] = (metadata.seq_lens if known is None else known).tolist()
    return counts


class SharedSteps:
    """What the layers of a rank need alike, once a step."""

    def __init__(self, tables: LayerTables, modules: list[Any]) -> None:
        """modules: vLLM's layers, which have the cache."""
        self.tables, self.recorded = tables, RecordedWork()
        self._modules = modules
        self._metadata: Any = None
        self._requests: StepRequests | None = None
        self._layers: list[LayerStep] = []

    def requests(self, metadata: Any) -> StepRequests:
        """Those of a step, whose metadata is one object for all builders."""
        if self._requests is None or metadata is not self._metadata:
            self._metadata, self._requests = metadata, StepRequests.read(metadata)
        return self._requests

    def cut(self, metadata: Any, period: int) -> None:
        """Under a content policy, before the step itself: where a single token's request has come to a cut."""
        begins, counts = metadata.query_start_loc_cpu.tolist(), _counts(metadata)
        for request, (begin, end, count) in enumerate(zip(begins, begins[1:], counts, strict=False)):
            if end - begin == 1 and (count - 1) % period == 0:
                for module in self._modules:
                    cache = module.kv_cache if isinstance(module.kv_cache, Tensor) else module.kv_cache[0]
                    module.impl.cut(cache, metadata.block_table_tensor[request], count - 1)

    def single_tokens(self, layer: int, requests: StepRequests) -> LayerStep:
        """The first layer works it out, inside of the CUDA graph where there is one."""
        if layer == 0:
            self._layers = self.tables.step(requests.blocks, requests.counts)
        return self._layers[layer]


class BlockBuilder(AttentionMetadataBuilder[StepRequests]):
    """One for each distinct number of rows."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        every = vllm_config.compilation_config.static_forward_context
        layers = {name: layer for name, layer in every.items() if isinstance(layer.impl, BlockImpl)}
        impls = [layer.impl for layer in layers.values()]
        self.entry_bytes = 2 * impls[0].head_size * vllm_config.model_config.dtype.itemsize
        self.period = impls[0].serving.period
        self.is_first = next(iter(layers)) in layer_names
        if impls[0].steps is None:
            check_attention(device, vllm_config.model_config.dtype, impls[0].head_size)
            layouts = [impl.layout(device) for impl in impls]
            cut = [layout.observation for layout in layouts if isinstance(layout, CutLayout)]
            observations = [one for one in cut if one is not None]
            tables = LayerTables(layouts, impls[0].head_size, observations)
            steps = SharedSteps(tables, list(layers.values()))
            for index, (impl, layout) in enumerate(zip(impls, layouts, strict=True)):
                impl.start(index, layout, steps)
            attention = impls[-1].attention
            if isinstance(attention, CutAttention):
                dtype, dim = vllm_config.model_config.dtype, impls[0].head_size
                # as requests are served; while graphs of that mode live, torch may begin none outside (pytorch#166792)
                with torch.inference_mode():
                    check_cuts(device, dtype, dim, attention.policy, attention.layer)
        self.steps: SharedSteps = impls[0].steps

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepRequests:
        if self.is_first:
            pulse.beat(common_attn_metadata, self.steps.tables, self.entry_bytes)
            if self.period:
                self.steps.cut(common_attn_metadata, self.period)
        return self.steps.requests(common_attn_metadata)


class BlockImpl(AttentionImpl[StepRequests]):
    """One layer. `assign` says which of a plan's it is, `start` with which others it is served."""

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
        self.index = 0
        self.steps: SharedSteps | None = None

    def assign(self, serving: Serving, layer: int, rank: int, tp_size: int) -> None:
        self.serving = serving
        self.slots, self.rows = serving.rank_slots(layer, rank, tp_size), serving.rows(layer, tp_size)

    def layout(self, device: torch.device) -> BlockLayout:
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
        if not self.serving.period:
            return layout
        observation = None
        if self.serving.window:
            observation = Observation.behind(
                self.slots, self.rows, self.serving.window, self.num_heads, self.head_size, device
            )
        return CutLayout.every(self.serving.period, layout, observation)

    def start(self, index: int, layout: BlockLayout, steps: SharedSteps) -> None:
        self.index, self.steps = index, steps
        if isinstance(layout, CutLayout) and self.serving is not None:
            policy = registry.create("policy", self.serving.policy, self.serving.policy_params)
            self.attention = CutAttention(
                layout=layout, scale=self.scale, softcap=self.softcap, policy=policy, layer=index,
                recorded=steps.recorded,
            )  # fmt: skip
        else:
            self.attention = BlockAttention(layout, self.scale, self.softcap)

    def cut(self, kv_cache: Tensor, blocks: Tensor, count: int) -> None:
        if isinstance(self.attention, CutAttention):
            self.attention.cut(self._entries(kv_cache), blocks, count)

    def _entries(self, kv_cache: Tensor) -> Tensor:
        """[num_blocks, rows, 2, D]; from 0.32 on vLLM has a shape of its own."""
        return kv_cache.view(kv_cache.shape[0], -1, 2, self.head_size)

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
        if self.attention is None or self.steps is None:
            raise RuntimeError("a layer of kvpolicy-vllm attends before it was started")
        attention, step = self.attention, attn_metadata
        cache = self._entries(kv_cache)
        out = output.view(-1, self.num_heads, self.head_size)
        if len(step.counts):
            at = slice(len(step.counts)) if step.at is None else step.at
            rows = self.steps.single_tokens(self.index, step)
            out[at] = attention.decode(query[at], key[at], value[at], cache, rows)
        for begin, end, before, blocks in step.chunks:
            q, k, v = query[begin:end], key[begin:end], value[begin:end]
            out[begin:end] = attention.chunk(q, k, v, cache, blocks, before)
        return output
