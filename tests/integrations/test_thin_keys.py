"""Caches whose keys have lost channels (ThinK): what they compute, what they weigh, what can be done with them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from kvpolicy_kernels.formats import THINK, EntryFormat

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, ModelSpec, PluginError, PromptProbe
from kvpolicy.comparison.methods import read_asked
from kvpolicy.integrations.transformers import Prompts, TransformersProbe, prompt_cache
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.measure.memory import estimate_memory
from kvpolicy.plugins.registry import registry
from tests.integrations.ragged_oracle import ragged_table, stepped_logits, visible_tokens
from tests.integrations.recording import record_on_cpu
from tests.tiny import over, tiny_ids, tiny_model

STEPS = (60, *[1] * 25, 15, *[1] * 20)
SINKS, DIM, KEPT, RECENT = 4, 16, 10, 6
SMALL_BLOCK = EntryFormat(16, exact_recent=RECENT, key_channels=0.6)


@pytest.fixture(scope="module")
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_model("Llama")
    torch.set_num_threads(before)


def exact_tokens(steps):
    """bool [T, T] (query, key): whether a query sees the key as it came."""
    total, begin = sum(steps), 0
    exact = torch.zeros(total, total, dtype=torch.bool)
    for count in steps:
        newest = begin if count > 1 else begin + 1  # a single token is written before it looks
        exact[begin : begin + count, max(0, newest - RECENT) :] = True
        exact[begin : begin + count, :SINKS] = True
        begin += count
    return exact


class ThinAttention:
    """Attention under a mask per KV head, over keys that a query sees whole or in some channels."""

    def __init__(self, visible, exact, channels):
        self.visible, self.exact, self.channels = visible, exact, channels  # of each head

    def __call__(self, call):
        group = call.query.shape[1] // call.key.shape[1]
        thin = torch.zeros_like(call.key)
        for batch, heads in enumerate(self.channels):
            for head, kept in enumerate(heads):
                thin[batch, head, :, kept] = call.key[batch, head][:, kept]
        scores = [call.query @ k.repeat_interleave(group, 1).transpose(-1, -2) for k in (call.key, thin)]
        logits = torch.where(self.exact, *scores) * call.options["scaling"]
        weights = logits.masked_fill(~self.visible.repeat_interleave(group, 0), float("-inf")).softmax(-1)
        return (weights @ call.value.repeat_interleave(group, 1)).transpose(1, 2), None


def by_the_rule(model, ids, table, prompt):
    """The channels of each (layer, sequence, KV head), of the keys that the window rule keeps of a prompt."""
    seen = {}

    def handler(row):
        def look(call):
            seen[row] = call.query[:, :, :prompt], call.key[:, :, :prompt]
            return call.stock()

        return look

    spec = ModelSpec.from_config(model.config)
    modules = attention_modules(model, spec.budgeted_layers)
    with intercepted(model, {module: handler(row) for row, (module, _) in enumerate(modules)}), torch.no_grad():
        model(ids[:, :prompt], use_cache=False)
    chosen = []
    for row, (query, key) in seen.items():
        square = query[:, :, -32:].square().mean(2).unflatten(1, (key.shape[1], -1)).mean(2)
        heads = []
        for head in range(key.shape[1]):
            recent = min(prompt, int(table[row, head])) - SINKS
            kept = torch.cat([key[:, head, :SINKS], key[:, head, prompt - recent : prompt]], 1)
            score = square[:, head] * kept.square().mean(1)
            heads.append([sorted(one.topk(DIM - KEPT, largest=False).indices.tolist()) for one in score])
        chosen.append([[[d for d in range(DIM) if d not in gone[b]] for gone in heads] for b in range(len(ids))])
    return chosen


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
@torch.no_grad()
def test_a_cache_equals_a_dense_forward_over_the_channels_that_are_left(model, is_recorded, monkeypatch):
    if is_recorded:
        record_on_cpu(monkeypatch)
    spec, ids = ModelSpec.from_config(model.config), tiny_ids(sum(STEPS), batch=2)
    table = ragged_table(spec, 12, 60)
    plan = BudgetPlan.from_capacities(spec, table, context_length=sum(STEPS))
    cache = kvpolicy.new_cache(model, plan, retention=plan.retentions[0], context_length=sum(STEPS), format=SMALL_BLOCK)
    logits = stepped_logits(model, ids, cache, list(STEPS))
    visible, exact = visible_tokens(table, SINKS, STEPS), exact_tokens(STEPS)
    visible[:, :, : STEPS[0], : STEPS[0]] = torch.ones(STEPS[0], STEPS[0]).tril().bool()
    channels = by_the_rule(model, ids, table, STEPS[0])
    found = [layer.arena.channels.view(2, -1, KEPT).tolist() for layer in cache.store.layers]
    assert found == channels
    handlers = {
        module: ThinAttention(visible[row], exact, channels[row])
        for row, (module, _) in enumerate(attention_modules(model, list(spec.budgeted_layers)))
    }
    with intercepted(model, handlers):
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert cache.lengths.max() == table.max()
    if is_recorded:
        assert cache.replays.mode == "graph"


def test_the_bytes_of_the_channels_go(model):
    sizes = []
    for entry_format in (None, "think"):
        cache = kvpolicy.new_cache(model, retention=0.9, context_length=400, format=entry_format)
        stepped_logits(model, tiny_ids(400), cache, [400])
        sizes.append(cache.nbytes)
    heads = 3 * 2
    block = 36 * (2 * DIM * 4 + 4)  # of a layer: keys and their positions
    assert sizes[0] - sizes[1] == heads * 360 * (DIM - KEPT) * 4 - 3 * block - heads * KEPT
    spec = ModelSpec.from_config(model.config)
    whole, thin = (estimate_memory(spec, 400, 0.9, 1, 4, entry_format=own) for own in (None, THINK))
    assert whole.kept_bytes + whole.table_bytes - thin.kept_bytes - thin.table_bytes == sizes[0] - sizes[1]


def test_memory_goes_to_more_entries(model):
    lengths = []
    for entry_format in (None, "think"):
        cache = kvpolicy.new_cache(model, policy="snapkv", memory=0.4, context_length=400, format=entry_format)
        stepped_logits(model, tiny_ids(400), cache, [400])
        assert cache.nbytes <= 0.4 * 400 * 6 * 2 * DIM * 4
        lengths.append(int(cache.lengths.sum()))
    assert lengths[1] > 1.05 * lengths[0]
    plain, thin = (
        method.table(ModelSpec.from_config(model.config), 400, 0.3, 0, torch.float32)
        for method in read_asked(["snapkv", "snapkv@think"])
    )
    assert int(thin.sum()) > int(plain.sum())


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o", "keydiff", "expected_attention"])
def test_a_cache_is_forked_copied_saved_and_reordered(model, policy, tmp_path):
    ids = tiny_ids(70, batch=2)
    options = {"policy": policy, "retention": 0.7, "context_length": 70, "format": SMALL_BLOCK}
    cache = kvpolicy.new_cache(model, **options)
    stepped_logits(model, ids[:, :60], cache, [50, 1, 1, 1, 7])
    cache.save(tmp_path / "cache")
    others = [cache.fork(), copy.deepcopy(cache), kvpolicy.load_cache(model, tmp_path / "cache")]
    rows, swapped = torch.tensor([1, 0]), cache.fork()
    swapped.reorder_cache(rows)
    expected = stepped_logits(model, ids[:, 60:], cache, [6, 1, 1, 1, 1])
    for other in others:
        torch.testing.assert_close(stepped_logits(model, ids[:, 60:], other, [6, 1, 1, 1, 1]), expected)
    again = stepped_logits(model, ids[rows, 60:], swapped, [6, 1, 1, 1, 1])
    torch.testing.assert_close(again[rows], expected, rtol=0, atol=1e-5)


def test_padding_chooses_nothing(model):
    """A padded row keeps the channels that it keeps alone, and one that is padding alone chooses when it has tokens."""
    ids = tiny_ids(50)
    alone = kvpolicy.new_cache(model, retention=1.0, format=SMALL_BLOCK)
    with torch.no_grad():
        model(ids[:, 30:], **over(alone))
        for parts in ((50,), (25, 25)):
            padded = kvpolicy.new_cache(model, retention=1.0, format=SMALL_BLOCK)
            mask = torch.ones(2, 50, dtype=torch.long)
            mask[1, :30] = 0
            places, begin = (mask.cumsum(1) - 1).clamp(min=0), 0
            for count in parts:
                end = begin + count
                model(
                    ids.expand(2, -1)[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=places[:, begin:end],
                    **over(padded),
                )
                begin = end
            for one, other in zip(alone.store.layers, padded.store.layers, strict=True):
                assert torch.equal(one.arena.channels, other.arena.channels[2:])


def test_tokens_are_taken_back(model):
    ids = tiny_ids(60)
    cache = kvpolicy.new_cache(model, retention=1.0, format=SMALL_BLOCK)
    expected = stepped_logits(model, ids[:, :50], cache, [40, 10])
    cache.crop(-10)
    again = stepped_logits(model, ids[:, 40:50], cache, [10])
    assert expected.shape[1] == 50 and again.shape[1] == 10
    drafted = kvpolicy.new_cache(model, retention=1.0, format=SMALL_BLOCK)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, **over(drafted), **options, prompt_lookup_num_tokens=3)
    assert out.shape[1] > 60


@pytest.mark.parametrize("least", [36, 80])
def test_a_prompt_is_compressed_as_by_a_cache(model, least):
    """Channels are those of the keys that a table keeps, so that a prompt is run again for each."""
    spec, ids = ModelSpec.from_config(model.config), tiny_ids(100)
    policy = registry.create("policy", "snapkv")
    prompts = Prompts(model, [ids[:, :80]], policy, entry_format=THINK)
    behind = ids[:, 80:]
    table = ragged_table(spec, least, 80)
    lowered = prompts.logits(0, table, behind)
    with torch.no_grad(), kvpolicy.attached(model):
        cache = prompt_cache(model, policy, table, entry_format=THINK)
        before = model(ids[:, :80], **over(cache)).logits[:, -1:]
        cache.hold(20)
        after = model(behind, **over(cache)).logits
    torch.testing.assert_close(lowered, torch.cat([before, after], 1), rtol=0, atol=1e-5)


def test_what_cannot_be_is_refused(model):
    ids = tiny_ids(64)
    with pytest.raises(BudgetError, match="format=think: a prompt's queries choose which key channels are kept"):
        TransformersProbe(model, ids, entry_format=THINK)
    probe = PromptProbe(model, ids, policy=registry.create("policy", "snapkv"), entry_format=THINK)
    with pytest.raises(PluginError, match="soft_loss is that of whole keys, and under format=think they lose channels"):
        probe.soft_loss(lambda layer, ranks: ranks.float())
    with pytest.raises(BudgetError, match="behind the repeated context of KVzipPolicy they are gone"):
        kvpolicy.new_cache(model, policy="kvzip", retention=0.5, format="think")
    for wrong in (EntryFormat(16, key_channels=0.6), EntryFormat(8, key_channels=0.6), EntryFormat(16)):
        with pytest.raises(BudgetError, match="or of 16 bits with a part of them and the last tokens exact"):
            kvpolicy.new_cache(model, retention=0.5, format=wrong)
    with pytest.raises(BudgetError, match="keys have 272 channels, 256 are the most"):
        kvpolicy.new_cache(tiny_model("Llama", layers=1, head_dim=272), retention=0.5, format="think")


RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "kvpress_channels.json"


def test_the_channels_are_those_of_kvpress(smollm2):
    """ThinKPress of kvpress 0.5.5, as `benchmarks/kvpress_parity.py --channels` wrote it down."""
    result, model = json.loads(RESULT.read_text(encoding="utf-8")), smollm2[0]
    cache = kvpolicy.new_cache(model, retention=1.0, format="think")
    with torch.no_grad():
        model(torch.tensor(list(result["prompts"].values())), **over(cache), logits_to_keep=1)
    kvpolicy.detach(model)
    overlaps = []
    for number, run in enumerate(result["runs"]):
        for layer, heads in enumerate(run["kept"]):
            ours = cache.store.layers[layer].arena.channels.view(len(result["runs"]), len(heads), -1)[number]
            for own, bits in zip(ours.tolist(), heads, strict=True):
                theirs = {place for place in range(64) if int(bits, 16) >> place & 1}
                assert len(theirs) == len(own) == 39
                overlaps.append(len(theirs & set(own)) / len(theirs | set(own)))
    assert len(overlaps) == 3 * 30 * 3
    assert sum(overlaps) / len(overlaps) >= 0.99
