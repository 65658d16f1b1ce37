"""What Qwen-VL notes on the model about a text travels with the text's cache."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

import kvpolicy
from tests.tiny import over, tiny_ids

TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 8}
TEXT |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48}
OWN = {
    "Qwen2_5_VL": {"window_size": 16, "fullatt_block_indexes": [0]},
    "Qwen3VL": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}
TOKENS = {"image_token_id": 97, "video_token_id": 98, "vision_start_token_id": 96, "vision_end_token_id": 99}
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def words(count):
    return tiny_ids(count).clamp(max=90)


# 16 tokens of an image that take up only as many positions as its longer side has
PROMPT = torch.cat([words(5), torch.tensor([[96] + [97] * 16 + [99]]), words(7)], 1)
IMAGE = {
    "pixel_values": torch.linspace(-1, 1, 64 * 3 * 2 * 4 * 4).reshape(64, -1),
    "image_grid_thw": torch.tensor([[1, 8, 8]]),
    "mm_token_type_ids": (PROMPT == 97).int(),
}


@pytest.fixture(scope="module", params=OWN)
def model(request):
    config = getattr(transformers, f"{request.param}Config")(
        text_config=dict(TEXT), vision_config=VISION | OWN[request.param], **TOKENS
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{request.param}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def first_turn(model, cache):
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **IMAGE, **over(cache), **OPTIONS)


def second_turn(model, cache, said):
    ids = torch.cat([said, words(9)], 1)
    types = {"mm_token_type_ids": (ids == 97).int()}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **types, **over(cache), **OPTIONS)


def other_chat(model, cache):
    ids = words(30)
    model.generate(ids, attention_mask=torch.ones_like(ids), **over(cache), **OPTIONS)


def stock(model):
    return DynamicCache(config=model.config)


def ours(model):
    return kvpolicy.new_cache(model, retention=1.0)


def conversation(model, cache):
    return second_turn(model, cache, first_turn(model, cache))


@pytest.mark.parametrize("make", [stock, ours])
def test_another_chat_between_two_turns(model, make):
    expected = conversation(model, stock(model))
    disturbed = stock(model)
    said = first_turn(model, disturbed)
    other_chat(model, stock(model))
    assert not torch.equal(second_turn(model, disturbed, said), expected), "the other chat must matter"
    cache = ours(model)
    assert torch.equal(first_turn(model, cache), said)
    other_chat(model, make(model))
    assert torch.equal(second_turn(model, cache, said), expected)


def test_new_words_alone(model):
    expected, cache = conversation(model, stock(model)), ours(model)
    said = kvpolicy.generate(model, cache, PROMPT, **IMAGE, **OPTIONS)
    other_chat(model, stock(model))
    answer = kvpolicy.generate(model, cache, words(9), **OPTIONS)
    assert torch.equal(torch.cat([said, answer], 1), expected)


def test_a_saved_cache_and_a_copy(model, tmp_path):
    expected, cache = conversation(model, stock(model)), ours(model)
    said = first_turn(model, cache)
    cache.save(tmp_path / "cache.kv")
    branch = copy.deepcopy(cache)
    other_chat(model, stock(model))
    for later in (kvpolicy.load_cache(model, tmp_path / "cache.kv"), branch):
        assert torch.equal(second_turn(model, later, said), expected)
        other_chat(model, ours(model))


def test_rows_keep_their_own(model):
    cache = ours(model)
    first_turn(model, cache)
    alone = cache.state.deltas.clone()
    assert alone.shape == (1, 1) and int(alone) < 0
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0]))
    assert torch.equal(cache.state.deltas, alone.expand(2, 1))
    cache.reset()
    assert cache.state.deltas is None
