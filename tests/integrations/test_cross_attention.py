"""Mllama: layers that read the image keep their stock caches; encoders are refused."""

import pytest
import torch
import transformers
from transformers import DynamicCache

import kvpolicy
from kvpolicy import ModelError
from tests.tiny import over, tiny_ids, tiny_model

IMAGE = {
    "pixel_values": torch.linspace(0, 1, 3 * 80 * 80).reshape(1, 1, 1, 3, 80, 80),
    "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
    "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.int64),
}
# of transformers 5.17 itself
pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")


@torch.no_grad()
def stepped(model, cache, first=0, steps=(20, 1, 1), image=True):
    """Logits after each step, from token `first` on; the image comes with the first token of all."""
    logits, ids = [], tiny_ids(40)
    for count in steps:
        given = {"cross_attention_mask": torch.ones(1, first + count, 1, 1, dtype=torch.int64)} if image else {}
        given |= IMAGE if image and not first else {}
        logits.append(model(ids[:, first : first + count], **over(cache), **given).logits[:, -1])
        first += count
    return torch.stack(logits)


@pytest.mark.parametrize("image", [True, False])
def test_an_image_is_read_as_over_a_stock_cache(image, tmp_path):
    model = tiny_model("Mllama")
    expected = stepped(model, DynamicCache(config=model.config), image=image)
    assert image == bool((expected - stepped(model, DynamicCache(config=model.config), image=False)).abs().max() > 1e-3)
    cache = kvpolicy.new_cache(model, retention=1.0)
    torch.testing.assert_close(stepped(model, cache, image=image), expected, rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == [[[22, 22]]] * 2  # of the layers 0 and 2; 1 and 3 read the image
    cache.save(tmp_path / "cache.kv")  # 101 tokens of the image, more than of the text
    loaded = kvpolicy.load_cache(model, tmp_path / "cache.kv")
    later = {"first": 22, "steps": (1, 1), "image": image}
    assert torch.equal(stepped(model, loaded, **later), stepped(model, cache, **later))


def test_an_encoder_that_its_configuration_does_not_betray_is_refused():
    config = transformers.EuroBertConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, vocab_size=97, pad_token_id=0
    )
    model = transformers.EuroBertForMaskedLM(config)
    with pytest.raises(ModelError, match="EuroBertAttention of EuroBertForMaskedLM reads in both directions"):
        kvpolicy.new_cache(model, retention=0.5)
    assert config._attn_implementation == "sdpa"
