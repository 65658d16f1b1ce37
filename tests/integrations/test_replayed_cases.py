"""Cases of a cache that come seldom, as replays: they give what they give without. And what runs without, and why."""

from types import SimpleNamespace

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import kvpolicy
from kvpolicy import registry
from kvpolicy.cache.arena import LayerArena
from kvpolicy.integrations.transformers.cache import replays
from tests.integrations.recording import record_on_cpu
from tests.tiny import over, tiny_ids, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTRUCTION = torch.tensor([7, 8, 9])


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", layers=2).to(DEVICE)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    return record_on_cpu(monkeypatch) if DEVICE == "cpu" else None


def decoded(model, cache, ids, is_replayed, mask=None):
    """Logits of each of `ids`, token by token, and what is kept then; checks how they ran."""
    forward, logits = model if is_replayed else model.forward.own, []
    for index in range(ids.shape[1]):
        seen = None if mask is None else mask[:, : cache.get_seq_length() + 1]
        more = {} if mask is None else {"position_ids": seen.sum(1, keepdim=True) - 1}
        with torch.no_grad():
            out = forward(ids[:, index : index + 1], attention_mask=seen, **more, **over(cache))
        logits.append(out.logits[:, -1])
    assert (cache.replays.mode, cache.replays.why) == (("graph", None) if is_replayed else (None, None))
    store = cache.opened()
    kept = [sorted(x.tolist()) for layer in range(len(store.layers)) for x in store.positions(layer)]
    return torch.stack(logits, 1), kept, cache.capacities.tolist()


def assert_alike(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-4)
    assert one[1:] == other[1:]


@pytest.mark.parametrize(("policy", "allocator"), [("snapkv", "adakv"), ("kv_compress", "kv_compress")])
def test_a_budget_that_is_split_at_run_time(policy, allocator, model):
    """Over the heads of each layer, over all layers; across a growth, which keeps the proportions."""
    ids, found = tiny_ids(110).to(DEVICE), []
    for is_replayed in (True, False):
        cache = kvpolicy.new_cache(model, policy=policy, allocator=allocator, retention=0.4, min_tokens=8)
        with torch.no_grad():
            model(ids[:, :40], **over(cache))
        found.append(decoded(model, cache, ids[:, 40:], is_replayed))
    assert_alike(*found)
    assert len({x for layer in found[0][2] for x in layer[0]}) > 1


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_rows_of_many_lengths_grow(policy, model):
    """Rows of one history share a table, the others have their own."""
    ids, found = tiny_ids(100, batch=4).to(DEVICE), []
    mask = torch.ones(4, 100, dtype=torch.int64, device=DEVICE)
    mask[1:3, :13], mask[3, :29] = 0, 0
    for is_replayed in (True, False):
        cache = kvpolicy.new_cache(model, policy=policy, retention=0.4, min_tokens=8)
        positions = (mask[:, :30].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model(ids[:, :30], attention_mask=mask[:, :30], position_ids=positions, **over(cache))
        found.append(decoded(model, cache, ids[:, 30:], is_replayed, mask))
        tables = cache.opened().rows.tables
        assert tables[1] is tables[2] and len({id(table) for table in tables}) == 3
    assert_alike(*found)


def test_behind_a_context_that_was_repeated(model):
    ids, found = tiny_ids(60).to(DEVICE), []
    for is_replayed in (True, False):
        cache = kvpolicy.new_cache(model, policy="kvzip", retention=0.4, min_tokens=8)
        with torch.no_grad():
            model(ids[:, :40], **over(cache))
        kvpolicy.repeat_context(model, cache, ids[:, :40], INSTRUCTION)
        found.append(decoded(model, cache, ids[:, 40:], is_replayed))
    assert_alike(*found)


def test_a_copy_whose_budget_is_lowered_between_tokens(model):
    """As a probe tries one table after another; what it was copied from goes on."""
    ids, found = tiny_ids(70).to(DEVICE), []
    for is_replayed in (True, False):
        cache = kvpolicy.new_cache(model, policy="snapkv", retention=0.5, context_length=70)
        with torch.no_grad():
            model(ids[:, :40], **over(cache))
        own = [decoded(model, cache, ids[:, 40:50], is_replayed)]
        fork = cache.fork()
        fork.rebudget(torch.tensor([[9, 14], [20, 6]]))
        own.append(decoded(model, fork, ids[:, 50:], is_replayed))
        assert fork.lengths[:, 0].tolist() == [[9, 14], [20, 6]]
        own.append(decoded(model, cache, ids[:, 50:], is_replayed))
        found.append(own)
    for one, other in zip(*found, strict=True):
        assert_alike(one, other)


@pytest.mark.parametrize("policy", ["streaming", "snapkv", "h2o"])
def test_a_cache_that_was_saved_between_tokens(policy, model, tmp_path):
    """What is loaded lays its entries out anew, and its tokens are replays of a graph of its own."""
    ids = tiny_ids(80).to(DEVICE)
    cache = kvpolicy.new_cache(model, policy=policy, retention=0.4, context_length=80)
    with torch.no_grad():
        model(ids[:, :40], **over(cache))
    decoded(model, cache, ids[:, 40:60], is_replayed=True)
    assert policy == "h2o" or bool(cache.opened().layers[0].arena.cursor.all()), "a ring that has turned"
    cache.save(tmp_path / "cache.kv")
    loaded = kvpolicy.load_cache(model, tmp_path / "cache.kv")
    assert_alike(*(decoded(model, each, ids[:, 60:], is_replayed=True) for each in (cache, loaded)))


@pytest.mark.parametrize("policy", registry.names("policy"))
def test_every_policy(policy, model):
    ids, found = tiny_ids(40).to(DEVICE), []
    for is_replayed in (True, False):
        cache = kvpolicy.new_cache(model, policy=policy, retention=0.5, context_length=40)
        with torch.no_grad():
            model(ids[:, :30], **over(cache))
        if cache.awaits_repeat:
            kvpolicy.repeat_context(model, cache, ids[:, :30], INSTRUCTION)
        found.append(decoded(model, cache, ids[:, 30:], is_replayed))
    assert_alike(*found)
    assert all(len(kept) == 20 for kept in found[0][1])


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(None)


def is_long(ids, scores):
    return torch.full((len(ids),), ids.shape[1] >= 38, device=ids.device)


WAYS = {
    "sampling": {"do_sample": True, "top_k": 20},
    "several answers": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "processors": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "criteria": {"do_sample": False, "stopping_criteria": StoppingCriteriaList([is_long])},
    "logits": {"do_sample": False, "output_logits": True, "return_dict_in_generate": True},
    "a streamer": {"do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_generate_offers(way, model, monkeypatch):
    found, ids = [], tiny_ids(30).to(DEVICE)
    for is_replayed in (True, False):
        if not is_replayed:
            monkeypatch.setattr(replays, "is_token", lambda *_: False)
        cache, streamer = kvpolicy.new_cache(model, retention=0.4, min_tokens=8), Heard()
        options = WAYS[way] | {"eos_token_id": None} | ({"streamer": streamer} if way == "a streamer" else {})
        torch.manual_seed(5)
        out = model.generate(ids, **over(cache), max_new_tokens=14, **options)
        assert cache.replays.mode == ("graph" if is_replayed else None)
        tokens = out if isinstance(out, torch.Tensor) else out.sequences
        found.append((tokens.tolist(), streamer.tokens, None if tokens is out else torch.stack(out.logits)))
    assert found[0][:2] == found[1][:2]
    assert way != "a streamer" or found[0][1] == [*found[0][0][0], None]
    assert way != "criteria" or len(found[0][0][0]) == 38
    if way == "logits":
        torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=1e-4)


def test_a_cache_that_attached_supplies(model):
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    cache = kvpolicy.new_cache(model, retention=0.4, min_tokens=8)
    expected = kvpolicy.generate(model, cache, ids := tiny_ids(30).to(DEVICE), **options)
    with kvpolicy.attached(model, retention=0.4, min_tokens=8):
        out = model.generate(ids, return_dict_in_generate=True, **options)
    assert out.sequences.equal(expected)
    assert out.past_key_values.replays.mode == cache.replays.mode == "graph"


class Elsewhere(LayerArena):
    device = torch.device("meta")


REASONS = {
    "several devices": "the layers lie on several devices",
    "processes": "processes share the model",
    "training": "in training mode",
    "autocast": "autocast casts the weights",
    "four dimensions": "not one of columns",
    "other tensors": "the model is given pixel_values",
    "own positions": "works out positions of its own",
}


@pytest.mark.parametrize("case", REASONS)
def test_what_runs_without_a_graph_says_why(case, model, monkeypatch):
    cache = kvpolicy.new_cache(model, retention=0.4)
    call = {"input_ids": tiny_ids(1).to(DEVICE)}
    with torch.no_grad():
        model(tiny_ids(20).to(DEVICE), **over(cache))
        assert replays.obstacle(cache, model, call) is None
        if case == "several devices":
            cache.opened().layers[1].arena.__class__ = Elsewhere
        elif case == "processes":
            monkeypatch.setattr(cache.opened(), "num_heads", 1)
        elif case == "training":
            monkeypatch.setattr(model, "training", True)
        elif case == "four dimensions":
            call["attention_mask"] = torch.ones(1, 1, 1, 21)
        elif case == "other tensors":
            call["pixel_values"] = torch.ones(1)
        elif case == "own positions":
            monkeypatch.setattr(cache, "state", SimpleNamespace(is_carried=True))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case == "autocast"):
            assert REASONS[case] in replays.obstacle(cache, model, call)
