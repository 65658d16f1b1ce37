"""`DecodeRunner` on tiny models: the logits and tokens of the model's own forward over the same cache."""

import weakref

import pytest
import torch

import kvpolicy
from kvpolicy import ModelError
from tests.integrations.recording import record_on_cpu
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES, COUNTED_IN_PYTHON

CONTEXT = 80


@pytest.fixture
def runner():
    """Makes a `DecodeRunner` over a cache with fixed capacities."""

    def make(model, **options):
        return kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, **{"context_length": CONTEXT} | options))

    return make


@pytest.fixture
def recorded(monkeypatch):
    return record_on_cpu(monkeypatch)


def stepped(model, cache, ids, prompt, mask=None):
    """Logits [B, n, V] behind the prompt and behind every further token, by the model's own forward."""
    forward = model.forward.own
    logits = [forward(ids[:, :prompt], **over(cache), attention_mask=mask, logits_to_keep=1).logits[:, -1]]
    for column in range(prompt, ids.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = ids[:, column : column + 1]
        logits.append(forward(step, **over(cache), attention_mask=mask).logits[:, -1])
    return torch.stack(logits, 1)


def run(runner, ids, prompt, mask=None):
    logits = [runner.prefill(ids[:, :prompt], mask)]
    logits += [runner.step(ids[:, column]) for column in range(prompt, ids.shape[1])]
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(runner, recorded, name):
    """Two prompts, behind the first of which more has been decoded than the second holds."""
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(52)
    options = {"policy": "snapkv", "allocator": "uniform", "retention": 0.5}
    found = runner(model, **options)
    for prompt in (40, 33):
        with torch.no_grad():
            expected = stepped(model, kvpolicy.new_cache(model, context_length=CONTEXT, **options), ids, prompt)
        torch.testing.assert_close(run(found, ids, prompt), expected, rtol=0, atol=1e-4)
    if name in COUNTED_IN_PYTHON:
        assert found.mode == "eager"
        assert "layers of other kinds" in found.why
    else:
        assert (found.mode, found.why) == ("graph", None)
        assert len(recorded) == 2, "once for each prompt"


OPTIONS = {
    "window": {"retention": 0.3},
    "scores": {"policy": "snapkv", "retention": 0.3},
    "rescored": {"policy": "h2o", "retention": 0.3},
    "split in a layer": {"policy": "snapkv", "allocator": "adakv", "retention": 0.6},
    "growing": {"retention": 0.3, "context_length": None, "min_tokens": 8},
    "everything": {"retention": 1.0},
    "appended": {"retention": 0.3, "decode": "append"},
    "spans": {"retention": 0.3, "protected": [(8, 15)]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prompt_after_prompt_over_freed_memory_that_was_poisoned(runner, recorded, options):
    model = tiny_model("Llama")
    found = runner(model, **options)
    for seed, prompt in enumerate((50, 31, 66)):
        ids = torch.randint(3, 97, (1, 78), generator=torch.Generator().manual_seed(seed))
        cache = kvpolicy.new_cache(model, **{"context_length": CONTEXT} | options)
        with torch.no_grad():
            expected = stepped(model, cache, ids, prompt)
        torch.testing.assert_close(run(found, ids, prompt), expected, rtol=0, atol=1e-4)
        assert found.mode == "graph"
        assert torch.equal(found.cache.lengths, cache.lengths)
        report, other = found.cache.report(), cache.report()
        assert (report.seen, report.entries, report.full) == (other.seen, other.entries, other.full)
        assert report.evicted == other.evicted
        for layer in found.cache.store.layers:
            layer.arena.keys.fill_(float("nan"))
            layer.arena.values.fill_(float("nan"))


def test_a_padded_batch(runner, recorded):
    model, ids = tiny_model("Llama"), tiny_ids(72, batch=2)
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, :13] = 0
    found = runner(model, retention=0.3)
    with torch.no_grad():
        expected = stepped(model, kvpolicy.new_cache(model, context_length=CONTEXT, retention=0.3), ids, 50, mask)
    torch.testing.assert_close(run(found, ids, 50, mask), expected, rtol=0, atol=1e-4)
    assert found.mode == "graph"
    assert found.cache.report().seen == (72, 59)
    assert found.cache.seen_mask().tolist() == torch.cat([mask, torch.ones(2, 22)], 1).tolist()


@pytest.mark.parametrize(("name", "policy"), [("Llama", "h2o"), ("GptOss", "streaming")])
def test_it_is_compiled_once_in_one_piece(monkeypatch, recorded, name, policy):
    """For all steps, of all prompts."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda work, **_: compile_(work, fullgraph=True, backend="eager"))
    model, ids = tiny_model(name, layers=2, attention=attention_of(name)), tiny_ids(50)
    options = {"retention": 0.4, "policy": policy, "allocator": "uniform", "min_tokens": 8}
    cache = kvpolicy.new_cache(model, **options)
    expected = model.generate(ids, **over(cache), max_new_tokens=20, do_sample=False, eos_token_id=None)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    cache = kvpolicy.new_cache(model, **options)
    found = kvpolicy.DecodeRunner(model, cache, compiled=True)
    for _ in range(2):
        assert found.generate(ids, 20).tolist() == expected.tolist()
        assert found.mode == "graph"
    assert counters["stats"]["unique_graphs"] == 1
    cache.reset()
    assert model.generate(ids, **over(cache), max_new_tokens=20, do_sample=False, eos_token_id=None).equal(expected)
    assert cache.replays.compiled and found.mode == "graph", "whoever decodes over the cache"


def test_generate(runner):
    model, ids = tiny_model("Llama"), tiny_ids(50)
    cache = kvpolicy.new_cache(model, retention=0.4, context_length=CONTEXT)
    expected = model.generate(ids, **over(cache), max_new_tokens=20, do_sample=False, eos_token_id=None)
    found = runner(model, retention=0.4)
    assert found.generate(ids, 20).tolist() == expected.tolist()
    end = int(expected[0, 54])
    ended = found.generate(ids, 20, eos_token_id=end)[0].tolist()
    assert ended == expected[0, : 50 + expected[0, 50:].tolist().index(end) + 1].tolist()
    least = found.generate(ids, 1, select=lambda logits: logits.argmin(-1))
    assert int(least[0, -1]) == int(found.prefill(ids)[0].argmin())


def test_several_tokens_that_end_a_row(runner):
    found, ids = runner(tiny_model("Llama"), retention=0.4), tiny_ids(50, batch=2)
    free = found.generate(ids, 12)
    ends = [int(free[0, 53]), int(free[1, 57])]
    first = [next(i for i in range(50, 62) if int(row[i]) in ends) for row in free]
    ended = found.generate(ids, 12, eos_token_id=ends)
    assert ended.shape[1] == max(first) + 1
    for row, whole, end in zip(ended, free, first, strict=True):
        assert row[: end + 1].tolist() == whole[: end + 1].tolist()
        assert set(row[end + 1 :].tolist()) <= {ends[0]}


def test_it_says_why_there_is_no_graph(runner):
    found = runner(tiny_model("Llama"), retention=0.4)
    found.prefill(tiny_ids(50))
    assert (found.mode, found.why) == (None, None)
    found.step(torch.tensor([5]))
    assert found.mode == "eager"
    assert found.why == "the model is on cpu, CUDA graphs need a CUDA device"
    found.prefill(tiny_ids(50))
    assert (found.mode, found.why) == (None, None)


def test_the_first_token_of_all_runs_by_itself(runner, recorded):
    found = runner(tiny_model("Llama"), retention=0.4)
    found.prefill(tiny_ids(50))
    found.step(torch.tensor([5]))
    assert found.mode == "eager"
    assert "the next is recorded" in found.why
    found.step(torch.tensor([5]))
    assert (found.mode, found.why) == ("graph", None)
    found.prefill(tiny_ids(50))
    found.step(torch.tensor([5]))
    assert found.mode == "graph", "the kernels are there"


def test_what_a_cache_can_do_it_can_do_between_steps(runner, recorded):
    """A prompt beyond the context that it was made for, a chunk, other rows, tokens taken back, and a copy."""
    model, ids = tiny_model("Llama"), tiny_ids(120, batch=2)
    found, cache = runner(model, retention=0.9), kvpolicy.new_cache(model, context_length=CONTEXT, retention=0.9)

    def both(columns, rows=slice(None)):
        given = ids[rows, columns]
        expected = model.forward.own(given, **over(cache)).logits[:, -1]
        logits = found.step(given) if given.shape[1] == 1 else model(given, **over(found.cache)).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    with torch.no_grad():
        found.prefill(ids[:, :40])
        model(ids[:, :40], **over(cache))
        for columns in (40, 41, 42, slice(43, 50), 50, 51, 52, 53, slice(54, 90), 90, 91, 92):
            both(slice(columns, columns + 1) if isinstance(columns, int) else columns)
        assert found.mode == "graph"
        for each in (found.cache, cache):
            each.reorder_cache(torch.tensor([1, 1]))
        for column in range(93, 97):
            both(slice(column, column + 1), [1, 1])
        assert found.mode == "graph"
        other = kvpolicy.DecodeRunner(model, found.cache)
        other.prefill(ids[:1])
        assert other.cache.report().seen == (120,)


def test_a_step_needs_a_prompt_of_the_runner(runner):
    found = runner(tiny_model("Llama"), retention=0.4)
    with pytest.raises(ModelError, match="this cache is empty: a prompt comes first"):
        found.step(torch.tensor([5]))
    other = kvpolicy.DecodeRunner(found.model, found.cache)
    found.prefill(tiny_ids(50))
    other.prefill(tiny_ids(20))
    with pytest.raises(ModelError, match="did not come from this runner: prefill\\(\\) first"):
        found.step(torch.tensor([5]))
    other.step(torch.tensor([5]))
    assert found.cache.report().seen == (21,)


def test_steps_of_other_shapes_are_refused(runner):
    found = runner(tiny_model("Llama"), retention=1.0)
    found.prefill(tiny_ids(50))
    with pytest.raises(ModelError, match=r"one token for each of 1 rows, got \[2\]"):
        found.step(torch.tensor([5, 6]))
    found.step(torch.tensor([[5]]))
    assert found.cache.report().seen == (51,)


@pytest.mark.parametrize("of", [{"layers": 2}, {"layers": 4}, {"num_kv_heads": 4}], ids=str)
def test_a_cache_of_another_model(of):
    cache = kvpolicy.new_cache(tiny_model("Llama"), retention=0.4)
    with pytest.raises(ModelError, match="made for a model of other layers or heads"):
        kvpolicy.DecodeRunner(tiny_model("Llama", **of), cache)


WRONG = {
    r"int64 \[sequences, tokens\], .* got torch.int64 \[50\]": (tiny_ids(50)[0], None),
    r"int64 \[sequences, tokens\], .* got torch.int64 \[1, 0\]": (tiny_ids(50)[:, :0], None),
    r"the prompt's shape, \[1, 50\], got \[1, 51\]": (tiny_ids(50), torch.ones(1, 51)),
    "padding on the left alone": (tiny_ids(50), (torch.arange(50) < 40)[None].long()),
    "padding on the left alone.*": (tiny_ids(50), (torch.arange(50) != 20)[None].long()),
}


@pytest.mark.parametrize(("message", "given"), WRONG.items(), ids=WRONG)
def test_prompts_that_it_cannot_take(runner, message, given):
    found = runner(tiny_model("Llama"), retention=0.4)
    with pytest.raises(ModelError, match=message):
        found.prefill(*given)
    assert found.generate(tiny_ids(50), 3).shape == (1, 53)


def test_a_prompt_that_was_forgotten_takes_no_memory():
    model = tiny_model("Llama")
    runner = kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, retention=0.4))
    runner.prefill(tiny_ids(50))
    former = weakref.ref(runner.cache.store)
    runner.cache.reset()
    assert former() is None, "the next prompt would have both in memory"
