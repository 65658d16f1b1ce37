"""KIVI's cache against its rule written out, and its rows in a comparison."""

import pytest
import torch

import kvpolicy
from kvpolicy import ModelError
from kvpolicy.comparison.methods import read_methods
from kvpolicy.comparison.run import compare
from kvpolicy.comparison.task import PerplexityTask
from kvpolicy.integrations.transformers import cache_nbytes, quantized_cache
from kvpolicy.integrations.transformers.cache.kivi import KiviLayer
from tests.tiny import over, tiny_ids, tiny_model


def decoded(groups, bits):
    """groups: [..., 32]"""
    least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (largest - least) / (2**bits - 1)
    return ((groups - least) / step).clamp(0, 2**bits - 1).round() * step + least


def by_the_rule(keys, values, bits, exact_keys, exact_values):
    """keys, values: [B, H, n, dim]; the last ones are exact."""
    keys, values = keys.clone(), values.clone()
    first = keys.shape[2] - exact_keys
    for begin in range(0, first, 32):
        keys[:, :, begin : begin + 32] = decoded(keys[:, :, begin : begin + 32].transpose(2, 3), bits).transpose(2, 3)
    first = values.shape[2] - exact_values
    for begin in range(0, values.shape[3], 32):
        values[:, :, :first, begin : begin + 32] = decoded(values[:, :, :first, begin : begin + 32], bits)
    return keys, values


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("steps", [(300, *[1] * 100, 140, 1), (40, *[1] * 240), (128, 128, 3)])
def test_a_layer_gives_back_what_the_rule_says(bits, steps):
    torch.manual_seed(0)
    layer, keys, values, seen = KiviLayer(bits), *torch.randn(2, 2, 3, sum(steps), 64), 0
    for count in steps:
        new = slice(seen, seen + count)
        found = layer.update(keys[:, :, new], values[:, :, new])
        # what a token finds is what the one before left; keys that came since the last block are exact
        expected = by_the_rule(
            keys[:, :, : seen + count],
            values[:, :, : seen + count],
            bits,
            exact_keys=seen % 128 + count,
            exact_values=min(seen, 128) + count,
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        seen += count
    assert layer.get_seq_length() == seen and layer.get_mask_sizes(3) == (seen + 3, 0)


def test_rows_without_a_step_come_back():
    layer, rows = KiviLayer(2), torch.ones(1, 1, 300, 32)
    layer.update(rows, rows)
    keys, values = layer.update(rows[:, :, :1], rows[:, :, :1])
    assert torch.equal(keys, torch.ones(1, 1, 301, 32)) and torch.equal(values, keys)


@pytest.mark.parametrize("bits", [4, 2])
def test_bytes_are_those_of_words_steps_and_what_is_exact(bits):
    model = tiny_model("Llama", head_dim=64)
    cache = quantized_cache(model, f"kivi{bits}")
    with torch.no_grad():
        model(tiny_ids(300), **over(cache))
    row, heads = 64 * bits // 8, 3 * 2
    keys = 256 * row + 8 * 64 * (4 + 4) + 44 * 64 * 4
    values = 172 * (row + 2 * (4 + 4)) + 128 * 64 * 4
    assert cache_nbytes(cache) == heads * (keys + values)


def test_rows_of_a_comparison_are_those_of_decoding_token_by_token(tmp_path):
    """As long as no block fills behind the prompt."""
    model, prompt = tiny_model("Llama", head_dim=32), 300
    ids = tiny_ids(320)
    task = PerplexityTask(model, ids, prefill_length=prompt)
    found = compare(task, read_methods(["quantized/kivi4", "quantized/kivi2", "tova"]), [0.5], tmp_path / "c.json")
    for kind in ("kivi4", "kivi2"):
        row, cache = found.rows[f"quantized/{kind}", 1.0], quantized_cache(model, kind)
        with torch.no_grad():
            logits = model(ids[:, :prompt], **over(cache)).logits[:, -1:]
            behind = model(ids[:, prompt:-1], **over(cache)).logits
        losses = torch.nn.functional.cross_entropy(torch.cat([logits, behind], 1)[0], ids[0, prompt:], reduction="none")
        torch.testing.assert_close(row.values()[0], losses.double().mean(), rtol=1e-5, atol=0)
        assert row.bytes < 0.6 * row.dense_bytes
    full, four, two = (found.rows[name, 1.0].losses[0] for name in ("full", "quantized/kivi4", "quantized/kivi2"))
    assert abs(four - full) < abs(two - full)


def test_other_models_are_refused():
    for name, why in (("Gemma3Window", "layers of full, sliding attention"), ("Llama", "keys of 16")):
        with pytest.raises(ModelError, match=why):
            quantized_cache(tiny_model(name), "kivi4")
    assert kvpolicy.ModelSpec.from_config(tiny_model("Llama").config).head_dim == 16
