"""Tiny random models of several architectures, with chosen query groups."""

import torch
import transformers


def tiny_model(name, *, group=3, num_kv_heads=2, layers=3, attention="sdpa", **extra):
    """A random model in fp32, evaluation mode. `group` is the number of query heads per KV head."""
    common = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": group * num_kv_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": 97,
        "max_position_embeddings": 512,
        "head_dim": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    full = ["full_attention"] * layers
    special = {
        "Llama": {},
        "Qwen2": {},
        "Phi3": {"num_attention_heads": 3, "num_key_value_heads": {1: 3, 3: 1}.get(group, 3)},
        "Gemma2": {"layer_types": full, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        "Gemma3": {"layer_types": full, "query_pre_attn_scalar": 16},
        "GptOss": {"layer_types": full, "num_local_experts": 2, "num_experts_per_tok": 1},
        "Cohere": {},
        "Olmo2": {},
        "Granite": {"residual_multiplier": 0.7},
        # layers alternate; the last two reuse the keys and values of layers 2 and 3
        "Gemma3n": {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "sliding_window": 32,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    }[name]
    config_class = getattr(
        transformers, {"Gemma3": "Gemma3TextConfig", "Gemma3n": "Gemma3nTextConfig"}.get(name, f"{name}Config")
    )
    model_class = getattr(transformers, {"Gemma3": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM"))
    torch.manual_seed(1)
    model = model_class(config_class(**{**common, **special, **extra}))
    for parameter in model.parameters():  # norms and biases too: a bug that a zero bias hides should show
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.set_attn_implementation(attention)
    return model.eval()
