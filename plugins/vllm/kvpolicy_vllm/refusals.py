"""What cannot hold under budgets per KV head is refused at start, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvpolicy import BudgetError

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")
HYBRID = ("Gemma3ForCausalLM",)
"""Of these some layers have sliding windows, and full attention where the model says so."""

EXACT = ("auto", "float16", "bfloat16", "float32")


def check(vllm_config: Any) -> None:
    """Raises `BudgetError` with all that stands in the way, in one line."""
    if reasons := list(_reasons(vllm_config)):
        raise BudgetError("kvpolicy-vllm cannot serve this: " + "; ".join(reasons))


def _reasons(config: Any) -> Iterator[str]:
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if cache.enable_prefix_caching:
        yield "prefix caching shares blocks whose entries depend on what came after (--no-enable-prefix-caching)"
    if config.speculative_config is not None:
        yield "speculative decoding: a rejected token has overwritten an entry already (no --speculative-config)"
    if config.kv_transfer_config is not None or getattr(cache, "kv_offloading_size", None):
        yield "KV connectors and offloading know blocks of tokens alone (no --kv-transfer-config)"
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield "context parallelism splits the tokens of a request (no DCP, no PCP)"
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism has not been tried (--pipeline-parallel-size 1)"
    if getattr(parallel, "enable_dbo", False):
        yield "dual-batch overlap has not been tried (no --enable-dbo)"
    if cache.cache_dtype not in EXACT:
        yield f"a cache quantised to {cache.cache_dtype} (--kv-cache-dtype auto)"
    if model.is_multimodal_model:
        yield "multi-modal prompts attend to prefixes in both directions"
    if getattr(model, "original_max_model_len", None) == -1:
        yield "a length that vLLM fits to the memory (give a number for --max-model-len)"
    if config.scheduler_config.disable_hybrid_kv_cache_manager and set(model.architectures) & set(HYBRID):
        yield "sliding windows without a cache of their own (no --disable-hybrid-kv-cache-manager)"
    heads = model.get_total_num_kv_heads()
    if heads % parallel.tensor_parallel_size:
        yield f"{parallel.tensor_parallel_size} tensor-parallel ranks do not divide the model's {heads} KV heads"
    yield from _model_reasons(model)


def _model_reasons(model: Any) -> Iterator[str]:
    names = list(model.architectures)
    if not set(names) & set(MODELS):
        yield f"the architecture {', '.join(names)}; known are {', '.join(MODELS)}"
    if model.get_sliding_window() is not None and not set(names) & set(HYBRID):
        yield f"sliding windows, but for those of {', '.join(HYBRID)}"
