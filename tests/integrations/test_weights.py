"""The weights of a model from its configuration alone."""

import pytest
import torch
import transformers
from transformers.utils import import_utils

from kvpolicy import ModelError
from kvpolicy.integrations.transformers import weights_of
from tests.tiny import tiny_model

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL |= {"vocab_size": 128, "intermediate_size": 32}


def counted(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_parameter_once():
    model = tiny_model("Llama")
    found = weights_of(model.config, 2)
    assert (found.nbytes, found.note) == (2 * counted(model), None)


def test_experts_in_mxfp4():
    config = transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    plain = weights_of(config, 2)
    assert plain.nbytes == 2 * counted(transformers.GptOssForCausalLM(config))
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    experts = 2 * 4 * (64 * 2 * 32 + 32 * 64)  # layers, experts, gate and up, down
    found = weights_of(config, 2)
    assert plain.nbytes - found.nbytes == experts * 2 - experts * 17 // 32
    assert found.note.startswith("mxfp4")


def test_other_quantisations_are_told():
    config = transformers.LlamaConfig(**SMALL)
    plain = weights_of(config, 2).nbytes
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    found = weights_of(config, 2)
    assert (found.nbytes, found.note) == (plain, "as if not quantised with gptq")


def test_the_text_part_is_enough_where_the_rest_needs_another_package():
    if import_utils.is_timm_available():
        pytest.skip("timm is installed, so the whole of Gemma 3n can be made")
    text = {**SMALL, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0, "laurel_rank": 8}
    text |= {
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0] * 2,
    }
    found = weights_of(transformers.Gemma3nConfig(text_config=text), 2)
    with torch.device("meta"):
        model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**text))
    assert (found.nbytes, found.note) == (2 * counted(model), "of the text part alone")


def test_no_language_model():
    with pytest.raises(ModelError, match="no causal language model of type 'eurobert'"):
        weights_of(transformers.EuroBertConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}), 2)
