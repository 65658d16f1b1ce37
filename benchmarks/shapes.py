"""Models with the shapes of known ones and random weights, which run as fast as trained ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPES = {
    "Llama-3-8B": (
        ("LlamaConfig", "LlamaForCausalLM"),
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    ),
    "Qwen2.5-7B": (
        ("Qwen2Config", "Qwen2ForCausalLM"),
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768},
    ),
    "Gemma-3-4B": (
        ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, "vocab_size": 262208,
         "max_position_embeddings": 131072},
    ),
}  # fmt: skip


def random_model(name: str, device: str = "cuda", **changes: Any) -> Any:
    """In bf16, from seed 0. changes: fields of the configuration that differ"""
    (config_class, model_class), sizes = SHAPES[name]
    config = getattr(transformers, config_class)(**sizes | changes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return getattr(transformers, model_class)(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def long_llama(num_layers: int, device: str = "cuda") -> Any:
    """Llama-3-8B's shape for contexts of up to 262144 tokens."""
    lengths = {"rope_theta": 500000.0, "max_position_embeddings": 262144}
    return random_model("Llama-3-8B", device, num_hidden_layers=num_layers, **lengths)


def described(model: Any) -> str:
    """What a CSV calls a model of `long_llama`."""
    return f"Llama-3-8B shape, {model.config.num_hidden_layers} layers, random"
