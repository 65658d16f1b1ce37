"""Layers that keep no entries (KVSharer): a cache equals a dense forward in which their keys and values are others'."""

import copy

import pytest
import torch
import transformers

import kvpolicy
from kvpolicy import BudgetError, ModelError, ModelSpec
from kvpolicy.integrations.transformers.probes import layer_sharing
from kvpolicy.integrations.transformers.probes.layer_sharing import find_sharing
from tests.integrations.ragged_oracle import masked_logits, ragged_table, stepped_logits, visible_tokens
from tests.integrations.recording import record_on_cpu
from tests.tiny import over, tiny_ids, tiny_model

STEPS = [40, 9] + [1] * 12 + [7] + [1] * 4
SINKS = 4
SHARED = {2: 0, 3: 2, 4: 1}  # 3 takes what 2 takes


@pytest.fixture
def model():
    model = tiny_model("Llama", layers=5)
    yield model
    kvpolicy.detach(model)


def spec_of(model):
    return ModelSpec.from_config(model.config).sharing(SHARED)


def fixed_cache(model, table, **options):
    """A cache under exactly this table of the layers that keep entries."""
    plan = kvpolicy.BudgetPlan.from_capacities(spec_of(model), table, 64)
    return kvpolicy.new_cache(model, plan, context_length=64, shared_layers=SHARED, **options)


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
def test_a_cache_equals_a_dense_forward_over_the_other_layers_entries(model, is_recorded, monkeypatch):
    recordings = record_on_cpu(monkeypatch) if is_recorded else None
    ids, table = tiny_ids(sum(STEPS), batch=2), ragged_table(spec_of(model), SINKS + 1, 30)
    expected = masked_logits(model, ids, visible_tokens(table, SINKS, STEPS), SHARED)
    cache = fixed_cache(model, table)
    logits = stepped_logits(model, ids, cache, STEPS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(cache.lengths, table[:, None].expand(-1, 2, -1))
    assert recordings is None or sum(each.replays for each in recordings) > 5
    own = kvpolicy.new_cache(model, retention=1.0)
    assert (stepped_logits(model, ids, own, STEPS) - expected).abs().max() > 1e-3, "sharing changes what is said"


@pytest.mark.parametrize("options", [{}, {"format": "int8"}, {"policy": "snapkv"}, {"policy": "h2o"}])
def test_every_policy_and_format_runs_and_a_full_budget_equals_a_dense_forward(model, options):
    ids = tiny_ids(60)
    visible = torch.ones(2, 2, 60, 60).tril().bool()
    cache = kvpolicy.new_cache(model, retention=1.0, shared_layers=SHARED, **options)
    logits = stepped_logits(model, ids, cache, [40, 8] + [1] * 12)
    exact = options.get("format") is None
    torch.testing.assert_close(logits, masked_logits(model, ids, visible, SHARED), rtol=0, atol=1e-4 if exact else 0.2)


def test_the_bytes_of_the_layers_go(model):
    ids = tiny_ids(200)
    caches = [kvpolicy.new_cache(model, retention=1.0, shared_layers=shared) for shared in (None, SHARED)]
    for cache in caches:
        stepped_logits(model, ids, cache, [200])
    whole, shared = (cache.nbytes for cache in caches)
    assert shared == pytest.approx(whole * 2 / 5, rel=0.001)
    asked = kvpolicy.new_cache(model, memory=0.3, context_length=200, shared_layers=SHARED, min_tokens=1)
    stepped_logits(model, ids, asked, [200])
    entries = 200 * 2 * 5 * 2 * 16 * 4
    assert 0.28 * entries < asked.nbytes <= 0.3 * entries, "a part of the full cache's bytes, not of those left"


def test_a_cache_that_shares_is_forked_copied_saved_and_taken_back(model, tmp_path):
    ids, table = tiny_ids(60, batch=2), ragged_table(spec_of(model), 10, 30)
    cache = fixed_cache(model, table)
    stepped_logits(model, ids[:, :50], cache, [50])
    cache.save(tmp_path / "cache")
    others = [cache.fork(), copy.deepcopy(cache), kvpolicy.load_cache(model, tmp_path / "cache")]
    expected = stepped_logits(model, ids[:, 50:], cache, [6, 1, 1, 1, 1])
    for other in others:
        assert torch.equal(stepped_logits(model, ids[:, 50:], other, [6, 1, 1, 1, 1]), expected)
        assert other.layers[3].owner is other.layers[0]
    cache.reset()
    again = stepped_logits(model, ids, cache, [50, 6, 1, 1, 1, 1])
    torch.testing.assert_close(again[:, 50:], expected, rtol=0, atol=1e-5)


def test_beams_and_drafts_go_over_it(model):
    ids = tiny_ids(30)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = kvpolicy.new_cache(model, retention=1.0, shared_layers=SHARED)
    greedy = model.generate(ids, **over(cache), **options)
    for more in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        cache = kvpolicy.new_cache(model, retention=1.0, shared_layers=SHARED)
        answer = model.generate(ids, **over(cache), **options, **more)
        assert answer.shape[1] > 30
        if "num_beams" not in more:
            assert torch.equal(answer, greedy)


def test_a_runner_takes_it(model):
    ids = tiny_ids(30)
    cache = kvpolicy.new_cache(model, retention=1.0, shared_layers=SHARED)
    logits = kvpolicy.DecodeRunner(model, cache).prefill(ids)
    visible = torch.ones(2, 2, 30, 30).tril().bool()
    torch.testing.assert_close(logits, masked_logits(model, ids, visible, SHARED)[:, -1], rtol=0, atol=1e-4)


def test_slots_take_it(model):
    options = {"retention": 0.5, "min_tokens": 8, "shared_layers": SHARED}
    runner = kvpolicy.SlotRunner(model, kvpolicy.new_cache(model, **options), slots=2, tokens=60)
    numbers = [runner.admit(tiny_ids(length), 6) for length in (30, 20)]
    said = {number: [] for number in numbers}
    while runner.running or runner.waiting:
        for number, token in runner.step().items():
            said[number].append(token)
    for number, length in zip(numbers, (30, 20), strict=True):
        table = kvpolicy.new_cache(model, **options | {"context_length": length + 6})
        alone = kvpolicy.DecodeRunner(model, table).generate(tiny_ids(length), 6)
        assert said[number] == alone[0, length:].tolist()


@pytest.mark.parametrize(
    ("name", "shared", "message"),
    [
        ("Llama", {0: 1}, "layer 0 cannot take layer 1's entries: that comes later"),
        ("Llama", {1: 1}, "that comes later"),
        ("Llama", {9: 1}, "layer 9 .* is no full-attention layer with entries of its own"),
        ("Gemma3Window", {1: 0}, "layer 0 .* is no full-attention layer"),
        ("Gemma3Window", {2: 1}, "layer 2 .* is no full-attention layer"),
        ("Gemma3n", {5: 1}, "layer 5 .* is no full-attention layer with entries of its own"),
    ],
)
def test_layers_of_other_kinds_are_refused(name, shared, message):
    model = tiny_model(name)
    with pytest.raises(ModelError, match=message):
        kvpolicy.new_cache(model, retention=0.5, shared_layers=shared)
    assert not kvpolicy.integrations.transformers.attention.attachment.is_attached(model)


def test_a_layer_that_others_reuse_keeps_its_entries():
    spec = ModelSpec.from_config(tiny_model("Gemma3n").config)
    assert spec.reused_layers == {2, 3} and spec.budgeted_layers == (1, 3)
    with pytest.raises(ModelError, match="layer 3 keeps its entries, which other layers"):
        spec.sharing({3: 1})


def rule_of(model, ids, count, most_similar):
    """KVSharer's rule, with the caches of transformers and hidden states of a model whose layers are exchanged."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model.model(ids, **over(cache)).last_hidden_state.flatten(1)
    mean = [[x.mean(0).transpose(0, 1).flatten(1) for x in (layer.keys, layer.values)] for layer in cache.layers]

    def distance(pair):
        return sum(float((a - b).norm(dim=-1).mean()) for a, b in zip(mean[pair[0]], mean[pair[1]], strict=True)) / 2

    found = {}
    pairs = [(i, j) for i in range(5) for j in range(i)]
    for i, j in sorted(pairs, key=distance, reverse=not most_similar):
        if i in found:
            continue
        tried = kvpolicy.new_cache(model, retention=1.0, shared_layers=found | {i: j})
        with torch.no_grad():
            hidden = model.model(ids, **over(tried)).last_hidden_state.flatten(1)
        if float(torch.cosine_similarity(hidden, whole, dim=-1).mean()) > 0.5:
            found[i] = j
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("most_similar", [False, True])
def test_the_map_is_that_of_the_rule(model, most_similar):
    ids = tiny_ids(24, batch=6)
    answer = find_sharing(model, ids, 3, most_similar=most_similar)
    assert answer.shared_layers == rule_of(model, ids, 3, most_similar)
    assert len(answer.similarity) == len(answer.shared_layers) <= answer.tried
    assert all(0.5 < cosine <= 1 for cosine in answer.similarity)


def test_pairs_that_change_too_much_are_not_taken(model, monkeypatch):
    monkeypatch.setattr(layer_sharing, "THRESHOLD", 2.0)
    answer = find_sharing(model, tiny_ids(24, batch=2), 1)
    assert answer.shared_layers == {} and answer.tried == 10
    for count in (0, 5):
        with pytest.raises(BudgetError, match=f"sharing is {count}, expected a number of layers from 1 to 4"):
            find_sharing(model, tiny_ids(24), count)
