import re

import pytest
import torch
from kvpolicy_baselines.retrieval import RetrievalEstimator

from kvpolicy import PluginError, TransformersProbe
from kvpolicy.testing import SyntheticProbe, check_estimator
from tests.tiny import tiny_ids, tiny_model

FILLER = "~"  # stands nowhere in the texts that are put in


def characters(text):
    """What is printable is 2 to 96, a new line 1; 0 begins a text."""
    return [1 if character == "\n" else ord(character) - 30 for character in text]


def readable(ids):
    return "".join({0: "^", 1: "\n"}.get(i, chr(i + 30)) for i in ids.tolist())


def probe_of(model, lengths, haystack=None):
    """Every character is a token."""
    haystack = haystack or characters(FILLER)
    prompts = [torch.tensor([0, *haystack * n])[:n] for n in lengths]
    return TransformersProbe(model, tiny_ids(64), prompts, tokenize=characters)


class Recording:
    """A probe that keeps what it is asked to run."""

    def __init__(self, probe):
        self.probe, self.asked = probe, []

    def __getattr__(self, name):
        return getattr(self.probe, name)

    def observe(self, visit, requires, *, prompts=None, observation_window=32):
        self.asked += [(prompt, observation_window) for prompt in prompts]
        self.probe.observe(visit, requires, prompts=prompts, observation_window=observation_window)


PARTS = re.compile(
    r"\^~+\nThe code of (?P<name>[A-Za-z]+) is(?P<needle> \d{7})\.\n~+\n"
    r"What is the code of (?P<asked>[A-Za-z]+)\? It is(?P<answer> \d{6})$"
)


def test_laws():
    check_estimator(RetrievalEstimator)
    check_estimator(RetrievalEstimator(depths=1, seed=-3))


def test_prompts_hold_a_needle_and_ask_for_it():
    probe = Recording(probe_of(tiny_model("Llama"), (130, 200)))
    RetrievalEstimator(depths=4).estimate(probe)
    assert [len(prompt) for prompt, _ in probe.asked] == [130] * 4 + [200] * 4, "as long as the calibration prompts"
    places, numbers = [], set()
    for prompt, window in probe.asked:
        found = PARTS.match(readable(prompt))
        assert found, readable(prompt)
        assert found["name"] == found["asked"]
        assert found["needle"][:-1] == found["answer"], "all but the last digit, which nothing follows"
        assert window == len(found["needle"])
        places.append(found.start("needle") / len(prompt))
        numbers.add(found["needle"])
    assert len(numbers) == 8
    for depths in (places[:4], places[4:]):
        assert depths == sorted(depths) and depths[0] < 0.3 and depths[-1] > 0.45


def test_equals_a_direct_computation():
    lengths = (130, 180)
    model = tiny_model("Llama")
    probe = Recording(probe_of(model, lengths, haystack=tiny_ids(60)[0].tolist()))
    found = RetrievalEstimator(depths=2, seed=5).estimate(probe)
    assert found.per_layer is None
    eager = tiny_model("Llama", attention="eager")
    expected = [[0.0, 0.0] for _ in range(3)]
    for prompt, _ in probe.asked:
        text = readable(prompt)
        start = re.search(r"The code of [A-Za-z]+ is( \d{7})\.", text).start(1)
        with torch.no_grad():
            attentions = eager(prompt[None], output_attentions=True).attentions
        for layer in range(3):
            for head in range(2):
                for query_head in range(head * 3, head * 3 + 3):
                    for query in range(len(prompt) - 8, len(prompt)):  # each predicts a token of the answer
                        mass = float(attentions[layer][0, query_head, query, start : start + 8].double().sum())
                        expected[layer][head] += mass / (3 * 8 * len(probe.asked))
    assert len(probe.asked) == 4
    for row, direct in zip(found.per_head.tolist(), expected, strict=True):
        assert row == pytest.approx(direct, abs=1e-6)
    assert found.per_head.max() > 1.1 * found.per_head.min(), "heads must differ for this to say anything"


def test_a_head_that_looks_for_digits_stands_out():
    model = tiny_model("Llama", group=1, num_kv_heads=3, layers=1)
    plain = RetrievalEstimator().estimate(probe_of(model, (200,)))
    digits = torch.tensor(characters("0123456789"))
    with torch.no_grad():
        block = model.model.layers[0]
        normed = block.input_layernorm(model.model.embed_tokens.weight)
        common = normed[digits].mean(0)
        # queries and keys of head 1 both point where digits do, in a pair of dimensions that turns slowly
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
            projection.weight[16:32] = 0
            projection.weight[23] = common
            projection.weight[31] = common
    found = RetrievalEstimator().estimate(probe_of(model, (200,)))
    assert found.per_head.argmax() == 1 and found.per_head[0, 1] > 2 * plain.per_head[0, 1]
    assert torch.equal(found.per_head[0, ::2], plain.per_head[0, ::2])


def test_seeds_draw_other_needles():
    probe = SyntheticProbe(lengths=(60,))
    first, same, other = (RetrievalEstimator(seed=seed).estimate(probe).per_head for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_prompts_without_room_are_left_out():
    model = tiny_model("Llama")
    probe = Recording(probe_of(model, (40, 150)))
    RetrievalEstimator(depths=2).estimate(probe)
    assert [len(prompt) for prompt, _ in probe.asked] == [150, 150]
    with pytest.raises(PluginError, match="the longest has 40 tokens, give a larger context"):
        RetrievalEstimator().estimate(probe_of(model, (40, 30)))
    with pytest.raises(PluginError, match="the longest has 0 tokens"):
        RetrievalEstimator().estimate(probe_of(model, ()))


def test_a_probe_without_a_tokenizer_is_refused():
    with pytest.raises(PluginError, match="no tokenizer"):
        RetrievalEstimator().estimate(TransformersProbe(tiny_model("Llama"), tiny_ids(64), [tiny_ids(60)[0]]))


def test_a_bad_number_of_depths_is_refused():
    with pytest.raises(PluginError, match="retrieval: depths must be at least 1, got 0"):
        RetrievalEstimator(depths=0)
