"""Tiny random models of several architectures, with chosen query groups."""

import torch
import transformers

from kvpolicy.integrations.transformers.model.versions import generate_with_cache
from tests.tiny_architectures import AROUND, CLASSES, options


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
    if name == "Falcon":
        del common["head_dim"]  # computed there, and an error to set
    config_class, model_class = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    config = getattr(transformers, config_class)(**{**common, **options(name, group, layers), **extra})
    if name in AROUND:
        outer, vision, vision_options, rest = AROUND[name]
        vision_config = getattr(transformers, vision)(**vision_options)
        config = getattr(transformers, outer)(text_config=config, vision_config=vision_config, **rest)
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():  # norms and biases too: a bug that a zero bias hides should show
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.set_attn_implementation(attention)
    return model.eval()


def attention_of(name):
    """The implementation that computes what the architecture says.

    SDPA has neither softcap nor sinks: transformers refuses it, and 5.17 leaves the softcap out without a word.
    """
    return "eager" if name.startswith(("Gemma2", "GptOss")) else "sdpa"


def tiny_ids(length, batch=1):
    """Tokens `[batch, length]` for any of the models, the same ones at each call: no special and no image tokens."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def over(cache):
    """The keyword argument that hands a cache to a forward or to generate; transformers 5.24 renamed it."""
    return generate_with_cache(cache)
