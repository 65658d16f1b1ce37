"""What each architecture of `tests.tiny` has that the others do not."""

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"

# Every architecture that should work with a cache.
ALL_FULL = ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Granite", "Olmo2", "Cohere"]
WITH_WINDOWS = ["Qwen2Window", "Cohere2", "Gemma2Window", "Gemma3Window", "GptOssWindow", "Llama4"]
SHARED_KEYS = ["Gemma3n", "Gemma4"]
WITH_LINEAR = ["Qwen3Next"]
COMPOSITE = ["Llava", "Gemma3Vision"]  # the language model's configuration lies inside another one
CROSSING = ["Mllama"]  # some layers read the image, through keys and values that do not grow with the text
ARCHITECTURES = [*ALL_FULL, *WITH_WINDOWS, *SHARED_KEYS, *WITH_LINEAR, *COMPOSITE, *CROSSING]

# Of them those with layers that no graph can hold: chunked and linear attention, and attention to an image.
COUNTED_IN_PYTHON = ["Llama4", *WITH_LINEAR, *CROSSING]

# Whose forward copies from the host under transformers 5.17, which no graph can hold either; not under all releases.
COPYING = ["Gemma3n", "GptOss", "GptOssWindow"]

# No attention function to exchange; latent attention.
REFUSED = ["Falcon", "DeepseekV3"]

# (configuration, model) in transformers; else <name>Config and <name>ForCausalLM
CLASSES = {
    "Qwen2Window": ("Qwen2Config", "Qwen2ForCausalLM"),
    "Gemma2Window": ("Gemma2Config", "Gemma2ForCausalLM"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "Gemma3Window": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GptOssWindow": ("GptOssConfig", "GptOssForCausalLM"),
    "Llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
    "Gemma3n": ("Gemma3nTextConfig", "Gemma3nForCausalLM"),
    "Gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "Llava": ("LlamaConfig", "LlavaForConditionalGeneration"),
    "Gemma3Vision": ("Gemma3TextConfig", "Gemma3ForConditionalGeneration"),
    "Mllama": ("MllamaTextConfig", "MllamaForConditionalGeneration"),
}

_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 8}

# Around the text configuration: (configuration, vision configuration, the rest). Image tokens lie above all others.
AROUND = {
    "Llava": ("LlavaConfig", "CLIPVisionConfig", _VISION, {"image_token_index": 97}),
    "Mllama": (
        "MllamaConfig",
        "MllamaVisionConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 80,  # 101 image tokens
            "patch_size": 8,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        {"image_token_index": 97},
    ),
    "Gemma3Vision": (
        "Gemma3Config",
        "SiglipVisionConfig",
        _VISION,
        {"image_token_index": 97, "boi_token_index": 98, "eoi_token_index": 99, "mm_tokens_per_image": 4},
    ),
}


def options(name, group, layers):
    """Options of the configuration beyond those all have. Layer types that alternate fix the number of layers."""
    full = {"layer_types": [FULL] * layers}
    alternating = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 32}
    gemma3 = {"query_pre_attn_scalar": 16}
    gemma2 = {**gemma3, "attn_logit_softcapping": 5.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    per_layer = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
    return {
        "Phi3": {"num_attention_heads": 3, "num_key_value_heads": {1: 3, 3: 1}.get(group, 3)},
        "Mistral": {"sliding_window": None},
        "Granite": {"residual_multiplier": 0.7},
        "Qwen2Window": {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 32,
            "max_window_layers": 2,  # the first two are full
        },
        "Cohere2": {"num_hidden_layers": 4, "sliding_window": 32, "layer_types": [SLIDING, SLIDING, FULL, FULL]},
        "Gemma2": {**full, **gemma2},
        "Gemma2Window": {**alternating, **gemma2},
        "Gemma3": {**full, **gemma3},
        "Gemma3Window": {**alternating, **gemma3},
        "Gemma3Vision": {**alternating, **gemma3, "vocab_size": 100},
        "Llava": {"vocab_size": 100},
        "Mllama": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3], "head_dim": None},
        "GptOss": {**full, **experts},
        "GptOssWindow": {**alternating, **experts},
        # no rotary embedding in the full layers, which scale their queries from the 16th token on
        "Llama4": {
            "num_hidden_layers": 4,
            "layer_types": [CHUNKED, FULL] * 2,
            "no_rope_layers": [1, 0] * 2,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "floor_scale": 16,
            **experts,
        },
        # the last two reuse the keys and values of layers 2 and 3
        "Gemma3n": {
            **alternating,
            **per_layer,
            "num_hidden_layers": 6,
            "layer_types": [SLIDING, FULL] * 3,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 6,
        },
        # the last four reuse the keys and values of layers 2 and 3; heads of the full layers are larger
        "Gemma4": {
            **alternating,
            **per_layer,
            "num_hidden_layers": 8,
            "layer_types": [SLIDING, FULL] * 4,
            "num_kv_shared_layers": 4,
            "global_head_dim": 32,
        },
        "Qwen3Next": {
            "num_hidden_layers": 4,
            "layer_types": [LINEAR, FULL] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "DeepseekV3": {
            "head_dim": 8,
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    }.get(name, {})
