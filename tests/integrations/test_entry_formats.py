"""Caches whose entries have 8 or 4 bits: what they compute, what they weigh, what can be done with them."""

import copy
import functools
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat, rounded

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, ModelSpec, PluginError
from kvpolicy.cache import encoded_arena
from kvpolicy.cache.attention_mass import attention_mass, attention_of_each
from kvpolicy.cache.chunk import Chunk
from kvpolicy.cache.encoded_arena import EncodedArena
from kvpolicy.cache.state import pack
from kvpolicy.comparison.methods import read_asked, read_methods
from kvpolicy.integrations.transformers import Prompts, TransformersProbe, prompt_cache
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.integrations.transformers.attention.key_centre import key_centres
from kvpolicy.measure.evaluation import measured_bytes
from kvpolicy.plugins.registry import registry
from tests.integrations.ragged_oracle import ragged_table, stepped_logits, visible_tokens
from tests.integrations.recording import record_on_cpu
from tests.integrations.saving import assert_same
from tests.tiny import over, tiny_ids, tiny_model

STEPS = (60, *[1] * 25, 15, *[1] * 20)
SINKS = 4
SMALL_BLOCK = EntryFormat(4, rotated=True, centred=True, exact_recent=6)


@pytest.fixture(scope="module")
def model():
    """Tensors are tiny here: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_model("Llama")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def biased():
    """A model whose keys lie far from zero, around something else in each head."""
    model = tiny_model("Qwen2")
    for attention, _ in attention_modules(model, range(3)):
        attention.k_proj.bias.data.mul_(200)
    return model


@pytest.fixture(params=["model", "biased"])
def any_model(request):
    return request.getfixturevalue(request.param)


def cache_over(model, policy="streaming", **options):
    return kvpolicy.new_cache(model, policy=policy, **({"retention": 0.4, "min_tokens": 8} | options))


def exact_tokens(entry_format, steps):
    """bool [T, T] (query, key): whether a query sees the key as it came."""
    total, begin, recent = sum(steps), 0, entry_format.exact_recent
    exact = torch.zeros(total, total, dtype=torch.bool)
    for count in steps:
        newest = begin if count > 1 else begin + 1  # a single token is written before it looks
        first = max(0, newest - recent) if recent else newest
        for query in range(begin, begin + count):
            exact[query, first if recent or count > 1 else total :] = True
            exact[query, : SINKS if recent else 0] = True
        begin += count
    if not recent:  # tokens of a chunk see one another as they came
        begin = 0
        for count in steps:
            exact[begin : begin + count, begin : begin + count] |= count > 1
            begin += count
    return exact


class CodedAttention:
    """Attention under a mask per KV head, over keys and values that a query sees exactly or as their codes say."""

    def __init__(self, visible, exact, entry_format, centre=None):
        self.visible, self.exact, self.format, self.centre = visible, exact, entry_format, centre

    def __call__(self, call):
        group = call.query.shape[1] // call.key.shape[1]
        centre = None if self.centre is None else self.centre.along(call.key.shape[2])
        coded = rounded(call.key, self.format, centre), rounded(call.value, self.format)
        visible = self.visible.repeat_interleave(group, 0)
        scores = [call.query @ k.repeat_interleave(group, 1).transpose(-1, -2) for k in (call.key, coded[0])]
        logits = torch.where(self.exact, *scores) * call.options["scaling"]
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        parts = [weights * self.exact, weights * ~self.exact]
        values = [x.repeat_interleave(group, 1) for x in (call.value, coded[1])]
        return sum(w @ v for w, v in zip(parts, values, strict=True)).transpose(1, 2), None


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("entry_format", [INT8, INT4, SMALL_BLOCK, EntryFormat(4), EntryFormat(8)])
@torch.no_grad()
def test_a_cache_equals_a_dense_forward_over_decoded_keys_and_values(any_model, entry_format, reads, monkeypatch):
    """reads: chunks and tokens attend to the codes, as on a GPU, whose scores are fp32: under a bias they are large"""
    monkeypatch.setattr(EncodedArena, "reads_codes", reads)
    model = copy.deepcopy(any_model).double()  # else a last bit of a key changes its code
    spec, ids = ModelSpec.from_config(model.config), tiny_ids(sum(STEPS))
    table = ragged_table(spec, 36, 60)
    plan = BudgetPlan.from_capacities(spec, table, context_length=sum(STEPS))
    cache = kvpolicy.new_cache(
        model, plan, retention=plan.retentions[0], context_length=sum(STEPS), format=entry_format
    )
    found = stepped_logits(model, ids, cache, list(STEPS))
    visible, exact = visible_tokens(table, SINKS, STEPS), exact_tokens(entry_format, STEPS)
    centres = key_centres(model, spec)
    handlers = {
        module: CodedAttention(visible[row], exact, entry_format, centres[row])
        for row, (module, _) in enumerate(attention_modules(model, list(spec.budgeted_layers)))
    }
    with intercepted(model, handlers):
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if reads else 1e-4)
    assert cache.lengths.max() == table.max()


@pytest.mark.parametrize("prefill", [0, 50])
@pytest.mark.parametrize("entry_format", [INT8, INT4, SMALL_BLOCK])
def test_one_forward_is_decoding_token_by_token(any_model, entry_format, prefill):
    """The window probe's loss is that of a cache under the same format."""
    model = copy.deepcopy(any_model).double()
    spec, ids = ModelSpec.from_config(model.config), tiny_ids(110)
    table = ragged_table(spec, 36, 60)
    probe = TransformersProbe(model, ids, prefill_length=prefill, entry_format=entry_format)
    (losses,) = probe.token_losses(table)
    plan = BudgetPlan.from_capacities(spec, table, context_length=110)
    cache = kvpolicy.new_cache(model, plan, retention=plan.retentions[0], context_length=110, format=entry_format)
    logits = stepped_logits(model, ids, cache, [prefill, *[1] * (110 - prefill)] if prefill else [1] * 110)
    expected = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")[probe.first_scored - 1 :]
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-5)
    assert measured_bytes(probe, table).bytes == probe.filled(table).nbytes


def test_a_prompt_is_lowered_to_what_it_would_have_been(model):
    """One run of a prompt serves all tables, in a format too."""
    spec, ids = ModelSpec.from_config(model.config), tiny_ids(100)
    policy, table = registry.create("policy", "snapkv"), ragged_table(spec, 36, 60)
    prompts = Prompts(model, [ids[:, :80]], policy, entry_format=INT4)
    behind, found = ids[:, 80:], []
    found.append(prompts.logits(0, table, behind))
    with torch.no_grad(), kvpolicy.attached(model):
        cache = prompt_cache(model, policy, table, entry_format=INT4)
        before = model(ids[:, :80], **over(cache)).logits[:, -1:]
        cache.hold(20)
        found.append(torch.cat([before, model(behind, **over(cache)).logits], 1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["snapkv@int4", "streaming/pyramid@int8"])
def test_methods_are_compared_at_equal_bytes(model, name):
    spec = ModelSpec.from_config(model.config)
    sizes = []
    for method in (read_asked(["streaming"])[0], *read_asked([name])):
        table = method.table(spec, 400, 0.2, 0, torch.float32)
        cache = prompt_cache(model, method.policy, table, entry_format=method.entry_format)
        with torch.no_grad(), kvpolicy.attached(model):
            model(tiny_ids(400), **over(cache))
        sizes.append(cache.nbytes)
    assert sizes[1] == pytest.approx(sizes[0], rel=5e-3)
    assert int(table.sum()) > 1.4 * spec.total_entries(0.2, 400)
    names = [method.name for method in read_methods([name])]
    assert name.replace("snapkv@", "snapkv/uniform@") in names
    assert any("@" in x and "uniform" in x for x in names)
    assert method.identity != replace(method, entry_format=None).identity


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
@pytest.mark.parametrize("name", [None, "int8", "int4"])
def test_bytes_that_were_asked_for_are_kept(model, name, policy):
    full = 400 * 3 * 2 * 2 * 64
    for memory, most in ((0.3, 0.3 * full), ("60kB", 60_000)):
        cache = kvpolicy.new_cache(model, policy=policy, memory=memory, context_length=400, format=name)
        with torch.no_grad():
            model(tiny_ids(400), **over(cache))
        assert most - 530 <= cache.nbytes <= most  # some 430 of these are for the tables of a decoded token


def test_bytes_that_cannot_be_are_refused(model):
    with pytest.raises(BudgetError, match=r"3072 bytes for 400 tokens.*fewest entries.*format=int4 take 34\d\d\d"):
        kvpolicy.new_cache(model, memory=0.01, context_length=400, format="int4")
    with pytest.raises(BudgetError, match="memory= needs context_length="):
        kvpolicy.new_cache(model, memory=0.1)
    with pytest.raises(BudgetError, match="beside retention= or tokens="):
        kvpolicy.new_cache(model, memory=0.1, retention=0.3)
    with pytest.raises(BudgetError, match="'much' is no size"):
        kvpolicy.new_cache(model, memory="much", context_length=9)
    with pytest.raises(BudgetError, match="memory is 0"):
        kvpolicy.new_cache(model, memory=0, context_length=9)


def test_formats_of_methods():
    everything = read_methods(["full@int4"])
    assert [method.name for method in everything] == ["full", "full@int4", "random/uniform"]
    assert [method.is_full for method in everything] == [True, False, False]
    with pytest.raises(PluginError, match=r"'quantized/int4@int8': .*have a format of their own"):
        read_asked(["quantized/int4@int8"])
    with pytest.raises(BudgetError, match="format= must be one of"):
        read_asked(["snapkv@int3"])


@pytest.mark.parametrize(("name", "policy"), [("int8", "streaming"), ("int4", "h2o"), ("int4", "keydiff")])
def test_a_saved_cache_goes_on_as_it_was(any_model, name, policy, tmp_path):
    model, ids = any_model, tiny_ids(140)
    cache = cache_over(model, policy, format=name)
    stepped_logits(model, ids[:, :90], cache, [70, *[1] * 20])
    copy = cache.fork()
    cache.save(tmp_path / "cache.kv")
    loaded = kvpolicy.load_cache(model, tmp_path / "cache.kv")
    assert loaded.recipe.entry_format == kvpolicy.new_cache(model, retention=0.4, format=name).recipe.entry_format
    assert_same(pack(cache.store), pack(loaded.store))  # codes too
    parts = [stepped_logits(model, ids[:, 90:120], x, [8, *[1] * 22]) for x in (cache, copy, loaded)]
    assert torch.equal(parts[0], parts[1])
    torch.testing.assert_close(parts[2], parts[0], rtol=0, atol=1e-5)
    assert loaded.report().entry_format == name


@pytest.mark.parametrize(("name", "policy"), [("int8", "streaming"), ("int4", "streaming"), ("int4", "h2o")])
def test_a_replayed_token_is_the_one_without_a_graph(model, name, policy, monkeypatch):
    record_on_cpu(monkeypatch)
    ids, logits = tiny_ids(140), []
    for forward in (model, getattr(model.forward, "own", model.forward)):
        cache = cache_over(model, policy, format=name)
        own = getattr(model.forward, "own", forward) if logits else model
        with torch.no_grad():
            parts = ids.split([70, *[1] * 45, 10, *[1] * 15], 1)
            logits.append(torch.cat([own(part, **over(cache)).logits for part in parts], 1))
        modes = cache.replays.mode
        assert modes == ("graph" if len(logits) == 1 else None)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_a_token_may_attend_to_the_codes(any_model, policy, monkeypatch):
    """As on a GPU, where the kernel reads codes."""
    ids, logits = tiny_ids(110), []
    for reads in (False, True):
        monkeypatch.setattr(EncodedArena, "reads_codes", reads)
        cache = cache_over(any_model, policy, format="int8")
        logits.append(stepped_logits(any_model, ids, cache, [60, *[1] * 50]))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("entry_format", [INT8, SMALL_BLOCK], ids=str)
def test_triton_reads_codes_for_chunks_of_any_length(model, entry_format, monkeypatch):
    """A long turn, a short one, a long one on top, and tokens between them; as over decoded entries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, logits, ids = copy.deepcopy(model).to(device), [], tiny_ids(135).to(device)
    by_triton = functools.partial(encoded_arena.encoded_attention, backend="triton")
    monkeypatch.setattr(encoded_arena, "encoded_attention", by_triton)
    for reads in (False, True):
        monkeypatch.setattr(EncodedArena, "reads_codes", reads)
        cache = cache_over(model, format=entry_format)
        found = [stepped_logits(model, ids[:, :105], cache, [60, 1, 20, 1, 6, 17])]
        cache.hold(40)
        with torch.no_grad():
            found += [model(part, **over(cache)).logits for part in ids[:, 105:].split([8, 20, 1, 1], 1)]
        logits.append(torch.cat(found, 1))
    torch.testing.assert_close(*logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "tova", "corm"])
@pytest.mark.parametrize("name", ["int8", "int4"])
@torch.no_grad()
def test_a_later_chunk_may_be_scored_by_the_codes(any_model, name, policy, monkeypatch):
    """As on a GPU."""
    arenas = []
    for reads in (False, True):
        monkeypatch.setattr(EncodedArena, "reads_codes", reads)
        cache = cache_over(any_model, policy, format=name)
        for part in tiny_ids(125).split([70, 30, 25], 1):
            any_model(part, **over(cache))
        arenas.append([layer.arena for layer in cache.store.layers])
    for left, right in zip(*arenas, strict=True):
        assert torch.equal(left.positions, right.positions)
        torch.testing.assert_close(right.scores, left.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4"])
@torch.no_grad()
def test_nothing_is_decoded_for_scores(any_model, name, monkeypatch):
    """Of a chunk, and of each of its queries: as over decoded entries. On a GPU, where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, found = copy.deepcopy(any_model).to(device), []
    cache = cache_over(model, "snapkv", format=name)
    for part in tiny_ids(125).to(device).split([70, 30, 25], 1):
        model(part, **over(cache))
    arena = cache.store.layers[1].arena
    query, key = (torch.randn(1, heads, 12, arena.like.shape[1], device=device) for heads in (4, 2))
    chunk, options = Chunk(key, key, torch.arange(125, 137)[None]), {"scale": 0.3, "power": 2.0}
    for reads in (False, True):
        monkeypatch.setattr(EncodedArena, "reads_codes", reads)
        found.append([score(arena, query, chunk, options) for score in (attention_mass, attention_of_each)])
        monkeypatch.setattr(EncodedArena, "vectors", property(lambda _: pytest.fail("entries were decoded")))
    for decoded, coded in zip(*found, strict=True):
        torch.testing.assert_close(coded, decoded, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("first", [6, 1])
def test_tokens_on_top_are_replayed(model, first, name, policy, monkeypatch):
    """Two turns that are held attend to the codes, as on a GPU, and to the exact block; the same over decoded ones."""
    record_on_cpu(monkeypatch)
    ids, logits, caches = tiny_ids(110), [], []
    for reads in (True, False):
        monkeypatch.setattr(EncodedArena, "reads_codes", reads)
        forward = model if reads else model.forward.own
        caches.append(cache_over(model, policy, format=name, decode="append"))
        with torch.no_grad():
            forward(ids[:, :70], **over(caches[-1]))
            caches[-1].hold(40)
            parts = ids[:, 70:].split([first, *[1] * (20 - first), 5, *[1] * 15], 1)
            logits.append(torch.cat([forward(part, **over(caches[-1])).logits for part in parts], 1))
    assert [cache.replays.mode for cache in caches] == ["graph", None]
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_beams_and_drafts(model):
    """Rows change places, and tokens are taken back."""
    ids, greedy = tiny_ids(60), {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    expected = kvpolicy.generate(model, cache_over(model, format="int4"), ids, **greedy)
    beams = kvpolicy.generate(model, cache_over(model, format="int4"), ids, num_beams=3, **greedy)
    assert beams.shape[1] <= 90
    cache = cache_over(model, format="int4")
    drafted = kvpolicy.generate(model, cache, ids, prompt_lookup_num_tokens=3, **greedy)
    assert drafted.shape == expected.shape
    assert cache.get_seq_length() == 89


def test_bytes_are_those_of_the_codes_and_of_the_exact_block(model):
    """At retention 1, so that there is one entry for each token: 16 channels of fp32 are 64 bytes."""
    ids, sizes = tiny_ids(100), {}
    for name in (None, "int8", "int4"):
        cache = kvpolicy.new_cache(model, retention=1.0, format=name)
        stepped_logits(model, ids, cache, [100])
        arenas = [layer.arena for layer in cache.store.layers]
        own = sum(tensor.nbytes for arena in arenas for key, tensor in arena.entries.items() if key != "positions")
        block = sum(x.nbytes for arena in arenas for x in arena.beside.values())
        sizes[name] = own, block
        entries = sum(len(arena.keys) for arena in arenas)
        assert entries == 3 * 2 * (100 + 64), "with the room that it has to grow"
    assert sizes[None] == (entries * 2 * 64, 0)
    assert sizes["int8"] == (entries * 2 * (16 + 4), 0)
    assert sizes["int4"] == (entries * 2 * (8 + 4), 3 * ((SINKS + 32) * 2 * 2 * 64 + (SINKS + 32) * 4))


def test_the_exact_tokens_are_kept_whatever_the_policy(model):
    """TOVA would evict some of the last tokens; under int4 these are inside every capacity."""
    cache = cache_over(model, "tova", retention=0.3, format="int4")
    ids = tiny_ids(150)
    for step, part in enumerate(ids.split([70, *[1] * 80], 1)):
        with torch.no_grad():
            model(part, **over(cache))
        seen = 70 + step
        for positions in (x for layer in range(3) for x in cache.store.positions(layer)):
            assert set(range(seen - 32, seen)) <= set(positions.tolist())


def test_what_cannot_be_is_refused(model):
    with pytest.raises(BudgetError, match="format= must be one of model, int8, int4, think, got 'int3'"):
        kvpolicy.new_cache(model, retention=0.4, format="int3")
    with pytest.raises(BudgetError, match="8 or 4 bits with all key channels"):
        kvpolicy.new_cache(model, retention=0.4, format=EntryFormat(16))
    odd = tiny_model("Llama", head_dim=24)
    with pytest.raises(BudgetError, match=r"format=int4: .*head dim 24.*multiple of 16.*Leave format= out"):
        kvpolicy.new_cache(odd, retention=0.4, format="int4")


def test_a_table_with_less_than_the_exact_block_gets_it_from_the_others(model):
    spec = ModelSpec.from_config(model.config)
    plan = BudgetPlan.from_capacities(spec, [[6, 90], [80, 60], [10, 54]], context_length=100)
    tables = [
        kvpolicy.new_cache(model, plan, retention=plan.retentions[0], context_length=100, format=name)
        .make_store(1, 2)
        .schedule.at(100, None)
        for name in (None, "int4")
    ]
    assert tables[0].tolist() == [[6, 90], [80, 60], [10, 54]]
    assert int(tables[1].min()) == SINKS + 32
    assert int(tables[0].sum()) == int(tables[1].sum())
