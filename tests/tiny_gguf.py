"""The tiny checkpoint as a GGUF file, which nobody has to download."""

import gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.embed_tokens": "token_embd",
    "model.layers": "blk",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def save_tiny_gguf(path, checkpoint, *, merges=None, without=()):
    """Writes the checkpoint of a directory in fp32. merges: instead of its own; without: tensors left out."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer, config = AutoTokenizer.from_pretrained(checkpoint), model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda each: each[1])
    out.add_token_list([token for token, _ in vocabulary])
    out.add_token_types([3 if number < 2 else 1 for _, number in vocabulary])
    syllables = [token for token, number in vocabulary if number >= 258]
    out.add_token_merges([" ".join(each) for each in syllables] if merges is None else merges)
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # GGUF interleaves the halves that RoPE turns
            heads = tensor.shape[0] // config.head_dim
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name not in without:
            out.add_tensor(_gguf_name(name), tensor.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _gguf_name(name):
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name
