"""Decoded tokens as replays: the same tokens as without, whatever came before, and who decodes need not know."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import kvpolicy
from kvpolicy.integrations.transformers.attention.replaying import ReplayedForward
from kvpolicy.integrations.transformers.cache import replays
from tests.integrations.recording import record_on_cpu
from tests.tiny import attention_of, over, tiny_ids, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGETS = [*((policy, None) for policy in ("streaming", "snapkv", "h2o", "tova")), ("streaming", 90), ("h2o", 90)]


@pytest.fixture
def model():
    return tiny_model("Llama").to(DEVICE)


@pytest.fixture
def recorded(monkeypatch):
    return record_on_cpu(monkeypatch) if DEVICE == "cpu" else None


def cache_over(model, policy="streaming", **options):
    options = {"retention": 0.4, "allocator": "uniform", "min_tokens": 8} | options
    return kvpolicy.new_cache(model, policy=policy, **options)


def eager(model, ids, cache):
    """Logits of each token, by the model's own forward."""
    with torch.no_grad():
        return model.forward.own(ids, **over(cache)).logits


def text(length, batch=1):
    return tiny_ids(length, batch=batch).to(DEVICE)


@pytest.mark.parametrize(("policy", "context"), BUDGETS)
def test_a_replayed_token_is_the_one_without_a_graph(policy, context, model, recorded):
    """Prompt, 70 tokens, a second turn, 12 more: across evictions, growth and the re-layouts of both."""
    ids = text(152)
    caches = [cache_over(model, policy, context_length=context) for _ in range(2)]
    logits = []
    with torch.no_grad():
        for cache, forward in zip(caches, (model, model.forward.own), strict=True):
            out = [forward(ids[:, :60], **over(cache)).logits[:, -1]]
            out += [forward(ids[:, i : i + 1], **over(cache)).logits[:, -1] for i in range(60, 130)]
            out += [forward(ids[:, 130:140], **over(cache)).logits[:, -1]]
            out += [forward(ids[:, i : i + 1], **over(cache)).logits[:, -1] for i in range(140, 152)]
            logits.append(torch.stack(out, 1))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert caches[0].replays.mode == "graph"
    assert caches[1].replays.mode is None
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert torch.equal(caches[0].capacities, caches[1].capacities)
    stores = [cache.opened() for cache in caches]
    for layer in range(len(stores[0].layers)):
        kept = [[sorted(x.tolist()) for x in store.positions(layer)] for store in stores]
        assert kept[0] == kept[1]
    if recorded is not None:
        assert sum(x.replays for x in recorded) == 69 + 12  # all but the first token


SPANS = [(55, 58), (63, 82), (100, 103)]
"""In the prompt, across its end, and beyond it."""


@pytest.mark.parametrize(
    ("policy", "context", "decode"),
    [*((*budget, "evict") for budget in BUDGETS), ("streaming", None, "append"), ("h2o", 90, "append")],
)
def test_spans_whose_tokens_are_decoded(policy, context, decode, model, recorded):
    """They are kept on top, while the tokens between them are given up, and few of them cost a recording."""
    ids = text(152)
    caches = [cache_over(model, policy, context_length=context, protected=SPANS, decode=decode) for _ in range(2)]
    parts = [ids[:, :70], *(ids[:, i : i + 1] for i in range(70, 152))]
    logits = []
    with torch.no_grad():
        for cache, forward in zip(caches, (model, model.forward.own), strict=True):
            logits.append(torch.stack([forward(part, **over(cache)).logits[:, -1] for part in parts], 1))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert (caches[0].replays.mode, caches[0].replays.why) == ("graph", None)
    if recorded is not None:
        assert sum(x.replays for x in recorded) == 81 and len(recorded) <= 6
    plain = cache_over(model, policy, context_length=context, decode=decode)
    with torch.no_grad():
        for part in parts:
            model(part, **over(plain))
    capacities = caches[0].opened().capacities
    assert torch.equal(capacities, plain.opened().capacities + 3 + 19 + 3)
    kept = [[sorted(x.tolist()) for x in cache.opened().positions(0)] for cache in caches]
    assert kept[0] == kept[1]
    pinned = {position for begin, end in SPANS for position in range(begin, end)}
    assert all(pinned <= set(own) for own in kept[0])
    assert decode == "append" or all(len(own) <= capacities[0, 0, 0] < 152 for own in kept[0])


def test_a_span_that_is_taken_back(model, recorded):
    """Behind its end entries leave in turns; before it one is looked for. A step back is another recording."""
    found = []
    for is_replayed in (True, False):
        cache, ids = cache_over(model, retention=0.5, context_length=150, protected=[(60, 66)]), text(90)
        forward = model if is_replayed else model.forward.own
        with torch.no_grad():
            out = forward(ids[:, :50], **over(cache))
            for stop in (70, 90):
                for i in range(cache.get_seq_length(), stop):
                    out = forward(ids[:, i : i + 1], **over(cache))
                if stop == 70:
                    cache.crop(-8)
        found.append((out.logits, [sorted(x.tolist()) for x in cache.opened().positions(0)]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)
    assert found[0][1] == found[1][1]
    assert all(len(own) == 75 + 6 for own in found[0][1])


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
@pytest.mark.parametrize(("policy", "context"), BUDGETS)
def test_rejected_drafts_between_replays(policy, context, model, recorded):
    """Behind a ring that has turned, drafts evict nobody until they are settled; then replays go on where they were."""
    ids, found = text(120), []
    for is_replayed in (True, False):
        cache = cache_over(model, policy, context_length=context, rollback=6)
        forward = model if is_replayed else model.forward.own

        def feed(tokens, forward=forward, cache=cache):
            with torch.no_grad():
                return forward(tokens, **over(cache)).logits[:, -1:]

        for part in ids[:, :90].split([60, *[1] * 30], 1):
            out = [feed(part)]
        store = cache.opened()
        assert cache.replays.mode == ("graph" if is_replayed else None)
        assert policy in ("h2o", "tova") or bool(store.layers[0].arena.cursor.all())
        before = [[sorted(x.tolist()) for x in store.positions(layer)] for layer in range(3)]
        cache.activate_past_recording()
        for drafts, rejected in ((4, 4), (6, 5), (1, 1), (4, 0)):
            wrong = torch.full((1, rejected), 7, device=DEVICE)
            begin = cache.get_seq_length()
            feed(torch.cat([ids[:, begin : begin + drafts - rejected], wrong], 1))
            assert [[sorted(x.tolist()) for x in store.positions(layer)] for layer in range(3)] == before
            cache.crop(-rejected)
        with pytest.raises(kvpolicy.BudgetError, match="the last 6 tokens cannot be taken back, only 5"):
            cache.crop(-6)
        cache.stop_recording()
        begin = cache.get_seq_length()
        assert begin == 95
        for i in range(begin, 120):
            out.append(feed(ids[:, i : i + 1]))
            assert i != begin + 2 or cache.replays.mode == ("graph" if is_replayed else None)
        assert torch.equal(cache.lengths, cache.capacities)
        kept = [[sorted(x.tolist()) for x in store.positions(layer)] for layer in range(3)]
        found.append((torch.cat(out, 1), kept))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)
    assert found[0][1] == found[1][1]


def test_generate_replays(model, recorded):
    cache = cache_over(model, context_length=50)
    expected = model.generate(text(50), max_new_tokens=60, do_sample=False, **over(cache))
    kvpolicy.detach(model)
    assert "forward" not in vars(model)
    cache = cache_over(model, context_length=50)
    restored = kvpolicy.generate(model, cache, text(50), max_new_tokens=60, do_sample=False)
    assert torch.equal(restored, expected)
    assert cache.replays.mode == "graph"


def test_left_padding(model, recorded):
    ids, mask = text(40, batch=2), torch.ones(2, 40, dtype=torch.int64, device=DEVICE)
    mask[1, :13] = 0
    out = kvpolicy.generate(model, (cache := cache_over(model)), ids, mask, max_new_tokens=40, do_sample=False)
    assert cache.replays.mode == "graph"
    alone = kvpolicy.generate(model, cache_over(model), ids[1:, 13:], max_new_tokens=40, do_sample=False)
    assert torch.equal(out[1, 13:], alone[0])


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_what_a_graph_would_leave_out_runs_without_one(model, recorded):
    cache, ids, seen = cache_over(model), text(90), []
    feed = lambda i, **more: model(ids[:, i : i + 1], **over(cache), **more)  # noqa: E731
    with torch.no_grad():
        model(ids[:, :50], **over(cache))
        for i in range(50, 55):
            feed(i)
        assert cache.replays.mode == "graph"
        hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
        feed(55)
        assert (cache.replays.mode, seen) == ("eager", [1])
        assert "hook" in cache.replays.why
        hook.remove()
        feed(56)
        assert cache.replays.mode == "graph"
        mask = torch.ones(1, 58, dtype=torch.int64, device=DEVICE)
        mask[:, 3] = 0
        feed(57, attention_mask=mask)
        assert "hides" in cache.replays.why
    with torch.enable_grad():
        feed(58)
    assert "no_grad" in cache.replays.why


def test_beams(model, recorded):
    """Rows change places between two tokens, and their entries stay in the same memory."""
    found = []
    for mode in ("graph", "eager"):
        cache = cache_over(model)
        if mode == "eager":
            kvpolicy.attach(model)
            del model.forward
        options = {"num_beams": 3, "max_new_tokens": 40, "do_sample": False}
        found.append(model.generate(text(50), **over(cache), **options))
        assert cache.replays.mode == (mode if mode == "graph" else None)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_drafts_run_without_one(model, recorded):
    cache, options = cache_over(model), {"prompt_lookup_num_tokens": 3, "max_new_tokens": 40, "do_sample": False}
    kvpolicy.generate(model, cache, text(50), **options)
    assert cache.replays.mode == "eager"
    assert "assisted" in cache.replays.why


def test_a_recording_that_fails_changes_nothing(model, recorded, monkeypatch):
    from kvpolicy.integrations.transformers.cache import replays

    ids = text(120)
    caches = [cache_over(model) for _ in range(2)]

    def record(work, device):
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    if DEVICE == "cuda":
        pytest.skip("the recording is a fake")
    with torch.no_grad():
        expected = [model.forward.own(part, **over(caches[0])).logits for part in ids.split([50, *[1] * 70], 1)]
        monkeypatch.setattr(replays, "record", record)
        found = []
        for index, part in enumerate(ids.split([50, *[1] * 70], 1)):
            keys = [x.arena.keys.clone() for x in caches[1].store.layers] if index == 2 else []
            if keys:  # the fake's work is done on the device too, which a capture would not do: over copies
                monkeypatch.setattr(replays, "record", lambda work, device: _failing(work, caches[1]))
            found.append(model(part, **over(caches[1])).logits)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), rtol=0, atol=1e-4)
    assert caches[1].replays.mode == "eager"
    assert "not permitted" in caches[1].replays.why


def _failing(work, cache):
    """Runs into an error in the middle of the layers, as a forward does that waits for the device."""
    layer, append = len(cache.store.layers) - 1, cache.store.append

    def fail(index, *args):
        if index == layer:
            raise RuntimeError("operation not permitted when stream is capturing")
        append(index, *args)

    cache.store.append = fail
    try:
        work()
    finally:
        del cache.store.append


def test_the_forward_in_front(model, recorded):
    """It is the model's own to look at, goes with the copy of a model, and leaves as it came."""
    import inspect

    signature = inspect.signature(model.forward)
    kvpolicy.attach(model)
    assert isinstance(vars(model)["forward"], ReplayedForward)
    assert inspect.signature(model.forward) == signature
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.forward.own.__self__ is copied
        cache = cache_over(copied)
        kvpolicy.generate(copied, cache, text(30), min_new_tokens=20, max_new_tokens=20)
        assert cache.replays.mode == "graph"
    kvpolicy.detach(model)
    assert "forward" not in vars(model)
    model.forward = other = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    kvpolicy.attach(model)
    assert model.forward.own is other
    kvpolicy.detach(model)
    assert vars(model)["forward"] is other


def test_weights_that_were_moved_are_recorded_again(model, recorded):
    cache, ids = cache_over(model), text(60)
    with torch.no_grad():
        model(ids[:, :50], **over(cache))
        for i in range(50, 55):
            model(ids[:, i : i + 1], **over(cache))
        graph = cache.replays._step
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for i in range(55, 58):
            model(ids[:, i : i + 1], **over(cache))
    assert cache.replays.mode == "graph"
    assert cache.replays._step is not graph


def test_a_cache_that_was_recorded_is_free_once_it_is_dropped(model, monkeypatch):
    class Nothing:
        def replay(self):
            pass

    if DEVICE == "cpu":
        monkeypatch.setattr(replays, "unrecordable", lambda device: None)
        monkeypatch.setattr(replays, "record", lambda work, device: (Nothing(), work()))
    cache, ids = cache_over(model), text(54)
    with torch.no_grad():
        for part in ids.split([50, 1, 1, 1, 1], 1):
            out = model(part, **over(cache))
    assert cache.replays.mode == "graph"
    assert cache in tuple(out.values())
    reference = weakref.ref(cache)
    gc.collect()
    gc.disable()
    try:
        del out, cache
        assert reference() is None
    finally:
        gc.enable()


def test_forks_and_resets(model, recorded):
    cache = cache_over(model)
    ids = text(60)
    first = kvpolicy.generate(model, cache, ids, max_new_tokens=20, do_sample=False)
    fork = cache.fork()
    assert fork.replays.mode is None
    more = [kvpolicy.generate(model, each, ids[:, :5], max_new_tokens=20, do_sample=False) for each in (cache, fork)]
    assert torch.equal(*more)
    cache.reset()
    assert torch.equal(kvpolicy.generate(model, cache, ids, max_new_tokens=20, do_sample=False), first)
    assert cache.replays.mode == "graph"


copies = pytest.mark.skipif(DEVICE == "cuda", reason="its forward copies from the host, which no graph holds")


@pytest.mark.parametrize(
    "name",
    [
        "Gemma3Window",
        "Gemma2Window",
        "Qwen2Window",
        "Cohere2",
        pytest.param("GptOssWindow", marks=copies),
        pytest.param("Gemma3n", marks=copies),
    ],
)
def test_layers_with_a_sliding_window(name, recorded):
    """Two rows, one of them padded, a second turn, and a window that has been full for long: as without steps."""
    model, ids = tiny_model(name, attention=attention_of(name)).to(DEVICE), text(90, batch=2)
    mask = torch.ones(2, 90, dtype=torch.int64, device=DEVICE)
    mask[1, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts, logits = (30, *[1] * 40, 5, *[1] * 15), []
    caches = [cache_over(model, "snapkv", allocator="uniform") for _ in range(2)]
    for cache, forward in zip(caches, (model, model.forward.own), strict=True):
        out, end = [], 0
        for count in parts:
            begin, end = end, end + count
            more = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            with torch.no_grad():
                out.append(forward(ids[:, begin:end], **more, **over(cache)).logits[:, -1])
        logits.append(torch.stack(out, 1))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-4)
    assert caches[0].replays.mode == "graph"
    assert caches[0].rings
    assert all(ring.entries is not None for ring in caches[0].rings)
    saved = [cache.fork() for cache in caches]
    for one, other in zip(saved[0].layers, saved[1].layers, strict=True):
        for key in ("keys", "values"):
            if isinstance(x := vars(one).get(key), torch.Tensor) and x.dim() == 4:
                torch.testing.assert_close(x[0], vars(other)[key][0], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")  # beyond the room there is none
@pytest.mark.parametrize(("policy", "batch"), [("streaming", 1), ("snapkv", 2), ("h2o", 1)])
def test_tokens_on_top_of_what_was_compressed(policy, batch, model, recorded):
    """A question, an answer, another question and answer, in two forks of one prompt; more tokens than were said."""
    ids = text(120, batch)
    whole = cache_over(model, policy, decode="append")
    with torch.no_grad():
        model(ids[:, :60], **over(whole))
        caches = [whole.fork() for _ in range(4)]
        lengths, logits = caches[0].lengths, []
        for cache, forward, room in zip(caches, (model, model.forward.own) * 2, (50, 50, 15, 15), strict=True):
            cache.hold(room)
            out = [forward(ids[:, 60:64], **over(cache)).logits[:, -1]]
            out += [forward(ids[:, i : i + 1], **over(cache)).logits[:, -1] for i in range(64, 80)]
            out += [forward(ids[:, 80:84], **over(cache)).logits[:, -1]]
            out += [forward(ids[:, i : i + 1], **over(cache)).logits[:, -1] for i in range(84, 96)]
            logits.append(torch.stack(out, 1))
    for pair in (logits[:2], logits[2:]):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-4)
    assert caches[0].replays.mode == "graph"
    assert torch.equal(caches[0].lengths, lengths + 36) and torch.equal(whole.lengths, lengths)
    for cache, other in (caches[:2], caches[2:]):
        assert torch.equal(cache.lengths, other.lengths)
        assert torch.equal(cache.fork().lengths, other.lengths)


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")  # the last ones find no room
def test_tokens_on_top_can_be_taken_back(model, recorded):
    ids, cache = text(90), cache_over(model)
    with torch.no_grad():
        model(ids[:, :60], **over(cache))
        cache.hold(20)
        for begin, end in ((60, 75), (70, 80), (80, 90)):
            cache.crop(-max(0, cache.get_seq_length() - begin))
            logits = [model(ids[:, i : i + 1], **over(cache)).logits[:, -1] for i in range(begin, end)]
        expected = cache_over(model)
        model.forward.own(ids[:, :60], **over(expected))
        expected.hold(20)
        out = [model.forward.own(ids[:, i : i + 1], **over(expected)).logits[:, -1] for i in range(60, 90)]
    assert cache.get_seq_length() == 90
    torch.testing.assert_close(torch.stack(logits), torch.stack(out[20:]), rtol=0, atol=1e-4)


def test_tokens_on_top_of_thin_keys(model, recorded):
    """Their keys have all channels, whatever those of the entries have left."""
    ids, logits = text(80), []
    caches = [cache_over(model, format="think", decode="append") for _ in range(2)]
    with torch.no_grad():
        for cache, forward in zip(caches, (model, model.forward.own), strict=True):
            forward(ids[:, :60], **over(cache))
            cache.hold(20)
            out = [forward(ids[:, i : i + 1], **over(cache)).logits[:, -1] for i in range(60, 80)]
            logits.append(torch.stack(out, 1))
    assert caches[0].replays.mode == "graph"
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_a_token_on_top_that_was_planned_before_others_came(model):
    ids, cache = text(80), cache_over(model)
    with torch.no_grad():
        model(ids[:, :60], **over(cache))
        cache.hold(20)
        store = cache.opened()
        assert store.advance(20)
        model(ids[:, 60:63], **over(cache))
    token = store.layers[0].pending.key[:, :, :1]
    with pytest.raises(kvpolicy.BudgetError, match="none is pending"):
        store.append(0, token, token)
    assert store.seen.tolist() == [63]


def test_a_token_on_a_cpu_is_a_step_without_a_graph(model, monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("there it is recorded")
    ids, caches, steps = text(70), [cache_over(model) for _ in range(2)], []
    step = caches[0].step
    monkeypatch.setattr(
        caches[0], "step", lambda layer, *args, **kwargs: steps.append(layer) or step(layer, *args, **kwargs)
    )
    with torch.no_grad():
        found = [model(part, **over(caches[0])).logits for part in ids.split([50, *[1] * 20], 1)]
        expected = [model.forward.own(part, **over(caches[1])).logits for part in ids.split([50, *[1] * 20], 1)]
    assert steps == [*range(len(caches[0].layers))] * 20
    assert caches[0].replays.mode == "eager"
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1))
    assert torch.equal(caches[0].lengths, caches[1].lengths)
