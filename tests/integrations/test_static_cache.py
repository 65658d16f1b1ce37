"""A cache at fixed addresses on tiny models: the same logits and tokens as the cache that is not."""

import pytest
import torch
from transformers import CompileConfig

import kvpolicy
from kvpolicy import BudgetError, GraphWarning, ModelError
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES

CONTEXT = 80


@pytest.fixture
def runner():
    """Makes a `DecodeRunner` over a tiny model, which is not on CUDA here and says so."""

    def make(model, **options):
        cache = kvpolicy.new_cache(model, context_length=CONTEXT, static=True, **options)
        return kvpolicy.DecodeRunner(model, cache)

    return make


def stepped(model, cache, ids, prompt, mask=None):
    """Logits [B, V] behind the prompt and behind every further token."""
    logits = [model(ids[:, :prompt], **over(cache), attention_mask=mask, logits_to_keep=1).logits[:, -1]]
    for column in range(prompt, ids.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = ids[:, column : column + 1]
        logits.append(model(step, **over(cache), attention_mask=mask).logits[:, -1])
    return torch.stack(logits, 1)


def run(runner, ids, prompt, mask=None):
    with torch.no_grad():
        logits = [runner.prefill(ids[:, :prompt], mask)]
        logits += [runner.step(ids[:, column]).clone() for column in range(prompt, ids.shape[1])]
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_architectures(runner, name):
    """Two prompts, behind the first of which more has been decoded than the second holds."""
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(62)
    options = {"policy": "snapkv", "allocator": "uniform", "retention": 0.5}
    static = runner(model, **options)
    for prompt in (50, 40):
        with torch.no_grad():
            expected = stepped(model, kvpolicy.new_cache(model, context_length=CONTEXT, **options), ids, prompt)
        torch.testing.assert_close(run(static, ids, prompt), expected, rtol=0, atol=1e-4)


OPTIONS = {
    "window": {"retention": 0.3},
    "scores": {"policy": "snapkv", "retention": 0.3},
    "split in a layer": {"policy": "snapkv", "allocator": "adakv", "retention": 0.6},
    "everything": {"retention": 1.0},
    "spans": {"retention": 0.3, "protected": [(8, 15)]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_prompt_after_prompt_over_freed_memory_that_was_poisoned(runner, options):
    model = tiny_model("Llama")
    static = runner(model, **options)
    for seed, prompt in enumerate((50, 31, 66)):
        ids = torch.randint(3, 97, (1, 78), generator=torch.Generator().manual_seed(seed))
        cache = kvpolicy.new_cache(model, context_length=CONTEXT, **options)
        with torch.no_grad():
            expected = stepped(model, cache, ids, prompt)
        torch.testing.assert_close(run(static, ids, prompt), expected, rtol=0, atol=1e-4)
        assert torch.equal(static.cache.lengths, cache.lengths)
        report, other = static.cache.report(), cache.report()
        assert (report.seen, report.entries, report.full) == (other.seen, other.entries, other.full)
        assert report.evicted == other.evicted
        static.cache.static.keys.fill_(float("nan"))
        static.cache.static.values.fill_(float("nan"))


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_a_padded_batch(runner):
    model, ids = tiny_model("Llama"), tiny_ids(72, batch=2)
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, :13] = 0
    with torch.no_grad():
        expected = stepped(model, kvpolicy.new_cache(model, context_length=CONTEXT, retention=0.3), ids, 50, mask)
    static = runner(model, retention=0.3)
    torch.testing.assert_close(run(static, ids, 50, mask), expected, rtol=0, atol=1e-4)
    assert static.cache.report().seen == (72, 59)
    assert static.cache.seen_mask().tolist() == torch.cat([mask, torch.ones(2, 22)], 1).tolist()


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GptOss"])
def test_generate_compiles_it(name):
    """transformers' own path: it compiles the decoding step of a cache that says that it can be."""
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(50)
    options = {"retention": 0.4, "context_length": CONTEXT}
    arguments = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **over(kvpolicy.new_cache(model, **options)), **arguments)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True
    cache = kvpolicy.new_cache(model, static=True, **options)
    found = model.generate(ids, **over(cache), compile_config=how, **arguments)
    assert found.tolist() == expected.tolist()
    assert counters["stats"]["unique_graphs"] == 1, "compiled once, for all steps"
    cache.reset()
    assert kvpolicy.generate(model, cache, ids, compile_config=how, **arguments).tolist() == expected.tolist()
    assert counters["stats"]["unique_graphs"] == 1, "and for the next prompt"


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_generate_of_the_runner(runner):
    model, ids = tiny_model("Llama"), tiny_ids(50)
    cache = kvpolicy.new_cache(model, retention=0.4, context_length=CONTEXT)
    expected = model.generate(ids, **over(cache), max_new_tokens=20, do_sample=False, eos_token_id=None)
    static = runner(model, retention=0.4)
    assert static.generate(ids, 20).tolist() == expected.tolist()
    end = int(expected[0, 54])
    ended = static.generate(ids, 20, eos_token_id=end)[0].tolist()
    assert ended == expected[0, : 50 + expected[0, 50:].tolist().index(end) + 1].tolist()
    least = static.generate(ids, 1, select=lambda logits: logits.argmin(-1))
    assert int(least[0, -1]) == int(static.prefill(ids)[0].argmin())


def test_it_says_why_there_is_no_graph(runner):
    model = tiny_model("Llama")
    static = runner(model, retention=0.4)
    with pytest.warns(GraphWarning, match="without a CUDA graph, and slower: the model is on cpu"):
        static.prefill(tiny_ids(50))
    assert static.mode == "eager"
    assert "cpu" in static.why


def test_bytes_are_those_of_the_budget():
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, retention=0.25, context_length=4000, static=True)
    with torch.no_grad():
        model(tiny_ids(300), **over(cache))
    entries = 0.25 * 4000 * 3 * 2
    assert entries * (16 + 16 + 1) * 4 <= cache.nbytes <= entries * (16 + 16 + 1) * 4 * 1.01 + 4000


REFUSED = {
    "needs context_length=": {"retention": 0.3},
    "H2OPolicy changes its scores": {"policy": "h2o", "retention": 0.3, "context_length": CONTEXT},
    "got decode='append'": {"retention": 0.3, "context_length": CONTEXT, "decode": "append"},
}


@pytest.mark.parametrize(("message", "options"), REFUSED.items(), ids=REFUSED)
def test_recipes_that_cannot_be_static_are_refused(message, options):
    model = tiny_model("Llama")
    with pytest.raises(BudgetError, match=message):
        kvpolicy.new_cache(model, static=True, **options)
    assert model.config._attn_implementation == "sdpa", "a refusal leaves the model as it was"


def test_what_fixed_addresses_rule_out_is_refused():
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, retention=0.3, context_length=CONTEXT, static=True)
    with pytest.raises(ModelError, match="empty: a prompt comes first"):
        cache.report()
    with torch.no_grad():
        model(tiny_ids(50), **over(cache))
        with pytest.raises(ModelError, match="one token at a time, got 3 tokens"):
            model(tiny_ids(3), **over(cache))
    for what in (
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.save("x"),
        cache.activate_past_recording,
    ):
        with pytest.raises(ModelError, match="static cache does not offer"):
            what()
    cache.reset()
    with torch.no_grad(), pytest.raises(BudgetError, match=r"made for a batch of 1 .* got 2"):
        model(tiny_ids(50, batch=2), **over(cache))
    with torch.no_grad(), pytest.raises(BudgetError, match="a prompt of 90 tokens was given a static store for 80"):
        other = kvpolicy.new_cache(model, retention=1.0, context_length=CONTEXT, static=True)
        model(tiny_ids(90), **over(other))


def test_a_runner_needs_a_static_cache_and_a_prompt(runner):
    model = tiny_model("Llama")
    with pytest.raises(ModelError, match="needs a static cache"):
        kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, retention=0.3))
    with pytest.raises(ModelError, match="prefill\\(\\) first"):
        runner(model, retention=0.3).step(torch.tensor([5]))


@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_wrong_steps_are_refused(runner):
    static = runner(tiny_model("Llama"), retention=1.0)
    static.prefill(tiny_ids(CONTEXT - 1))
    with pytest.raises(ModelError, match=r"one token for each of 1 rows, got \[2\]"):
        static.step(torch.tensor([5, 6]))
    static.step(torch.tensor([5]))
    with pytest.raises(BudgetError, match=r"everything is kept .* room for 80 tokens"):
        static.step(torch.tensor([5]))
