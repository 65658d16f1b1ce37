"""Decoding in a CUDA graph: the same tokens as without, whatever came before, and nothing waits or grows."""

import contextlib
import warnings

import pytest
import torch

import kvpolicy
from kvpolicy.cache.encoded_arena import EncodedArena
from kvpolicy.integrations.transformers.cache import replays
from tests.integrations.test_decode_runner import CONTEXT, run, stepped
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES, COPYING, COUNTED_IN_PYTHON

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch's compiler, of itself
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]
POLICIES = ("streaming", "snapkv", "h2o", "tova", "kv_compress")


@pytest.fixture(scope="module")
def smollm2():
    return kvpolicy.load_model("smollm2-135m", device="cuda", dtype="float32")


@contextlib.contextmanager
def no_graphs(monkeypatch):
    """Within the context tokens run one by one, for comparison."""
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(replays, "unrecordable", lambda device: "for comparison")
        warnings.simplefilter("ignore", kvpolicy.GraphWarning)
        yield


def runner_of(model, *, compiled=False, **options):
    """A runner whose third token was a replay: a fall-back is an error."""
    runner = kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, **options), compiled=compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kvpolicy.GraphWarning)
        token = runner.prefill(tiny_ids(20).cuda()).argmax(-1)
        for _ in range(3):
            token = runner.step(token).argmax(-1)
    assert (runner.mode, runner.why) == ("graph", None)
    return runner


def check_architecture(name, runner_of):
    """Two prompts, behind the first of which more has been decoded than the second holds."""
    model, ids = tiny_model(name, attention=attention_of(name)).cuda(), tiny_ids(72).cuda()
    options = {"policy": "snapkv", "allocator": "uniform", "retention": 0.5, "context_length": CONTEXT}
    runner = runner_of(model, **options)
    for prompt in (50, 12):
        with torch.no_grad():
            expected = stepped(model, kvpolicy.new_cache(model, **options), ids, prompt)
        torch.testing.assert_close(run(runner, ids, prompt), expected, rtol=0, atol=2e-4)
    return runner


CAPTURED = [name for name in ARCHITECTURES if name not in (*COUNTED_IN_PYTHON, *COPYING)]


@pytest.mark.parametrize("name", COPYING)
def test_architectures_that_copy_from_the_host(name):
    """They fall back, told once, under the releases of transformers that do so."""

    def make(model, **options):
        return kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, **options))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", kvpolicy.GraphWarning)
        runner = check_architecture(name, make)
    reasons = [str(each.message) for each in told if each.category is kvpolicy.GraphWarning]
    if runner.mode == "graph":
        assert (reasons, runner.why) == ([], None)
    else:
        assert "Cannot copy between CPU and CUDA" in runner.why
        assert reasons == [f"decoding runs without a CUDA graph, and slower: {runner.why}"]


@pytest.mark.parametrize("name", [*CAPTURED, "Gemma2", "Gemma3"])
def test_architectures(name):
    assert check_architecture(name, runner_of).mode == "graph"


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Phi3", "Gemma2", "Gemma3Window"])
def test_architectures_that_are_compiled(name):
    def make(model, **options):
        return runner_of(model, compiled=True, **options)

    assert check_architecture(name, make).mode == "graph"


@pytest.mark.parametrize("name", COUNTED_IN_PYTHON)
@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_architectures_that_fall_back(name):
    """Some of their layers count in Python. The logits are right all the same."""

    def make(model, **options):
        return kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, **options))

    runner = check_architecture(name, make)
    assert runner.mode == "eager"
    assert "layers of other kinds" in runner.why


def test_a_fall_back_is_told_once():
    model = tiny_model("Qwen3Next").cuda()
    runner = kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, retention=0.5))
    with pytest.warns(kvpolicy.GraphWarning, match="without a CUDA graph, and slower: layers of other kinds") as told:
        runner.generate(tiny_ids(50).cuda(), 10)
        runner.generate(tiny_ids(50).cuda(), 10)
    assert len(told) == 1


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_formats_are_replayed(name, policy, monkeypatch):
    """From the codes, with the exact block beside those of int4; as over decoded entries."""
    model, ids = tiny_model("Llama").cuda(), tiny_ids(120).cuda()
    options = {
        "policy": policy, "allocator": "uniform", "retention": 0.5, "context_length": len(ids[0]), "format": name
    }  # fmt: skip
    runner = runner_of(model, **options)
    found = run(runner, ids, 90)
    assert (runner.mode, runner.why) == ("graph", None)
    monkeypatch.setattr(EncodedArena, "reads_codes", False)
    with torch.no_grad(), no_graphs(monkeypatch):
        expected = stepped(model, kvpolicy.new_cache(model, **options), ids, 90)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


PLANS = ("uniform", "ragged", "steep")


def plan_of(model, shape, context):
    """30 % of the context; evenly, lognormal, or with early layers ten times the last."""
    spec = kvpolicy.ModelSpec.from_config(model.config)
    layers, heads = spec.table_shape
    shares = {
        "uniform": torch.ones(layers, heads),
        "ragged": torch.randn(layers, heads, generator=torch.Generator().manual_seed(0)).exp(),
        "steep": torch.linspace(10, 1, layers)[:, None].expand(-1, heads),
    }[shape]
    budget = kvpolicy.Budget(spec.total_entries(0.3, context), spec.table_shape, 5, context)
    return kvpolicy.BudgetPlan.from_capacities(spec, kvpolicy.apportion(shares, budget), context_length=context)


def prompt_of(tokenizer, length, skip):
    text = kvpolicy.read_corpus(tokenizer).sequences("search", 1, skip + length)
    return text[:, skip:].cuda()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("context", [None, 1024], ids=["growing", "fixed"])
def test_600_tokens_behind_each_of_three_prompts(smollm2, policy, context, monkeypatch):
    """Across evictions, growth and the re-layouts of both; memory that is free between prompts is poisoned."""
    model, tokenizer = smollm2
    plan = plan_of(model, "ragged", 1024)
    options = {"plan": plan, "retention": 0.3, "policy": policy, "context_length": context}
    runner = runner_of(model, **options)
    for length in (900, 150, 500):
        prompt = prompt_of(tokenizer, length, skip=length)
        found = runner.generate(prompt, 600)
        assert runner.mode == "graph"
        plain = kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, **options))
        with no_graphs(monkeypatch):
            assert found.tolist() == plain.generate(prompt, 600).tolist()
        assert plain.mode == "eager"
        assert torch.equal(runner.cache.lengths, plain.cache.lengths)
        assert torch.equal(runner.cache.capacities, plain.cache.capacities)
        for layer in runner.cache.store.layers:
            layer.arena.keys.fill_(float("nan"))
            layer.arena.values.fill_(float("nan"))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["ragged", None])
def test_turns_of_a_conversation(smollm2, policy, shape, monkeypatch):
    model, tokenizer = smollm2
    options = {"retention": 0.3, "policy": policy, "min_tokens": 64}
    if shape is not None:
        options["plan"] = plan_of(model, shape, 1024)
    turns = [prompt_of(tokenizer, length, skip=length) for length in (300, 40, 170)]

    def talk():
        cache = kvpolicy.new_cache(model, **options)
        answers = [
            kvpolicy.generate(model, cache, turn, max_new_tokens=90, do_sample=False, eos_token_id=None).tolist()
            for turn in turns
        ]
        return cache, answers

    cache, found = talk()
    assert cache.replays.mode == "graph"
    with no_graphs(monkeypatch):
        plain, expected = talk()
    assert plain.replays.mode == "eager"
    assert found == expected
    assert torch.equal(cache.lengths, plain.lengths)


@pytest.mark.parametrize("shape", PLANS)
def test_tokens_of_the_torch_path(smollm2, shape):
    """Against the cache on the CPU, where everything is torch's: 200 tokens in fp32."""
    model, tokenizer = smollm2
    prompt = prompt_of(tokenizer, 600, skip=2000)
    found = runner_of(model, plan=plan_of(model, shape, 1024), context_length=1024).generate(prompt, 200).tolist()
    try:
        on_cpu = model.cpu()
        cache = kvpolicy.new_cache(on_cpu, plan_of(on_cpu, shape, 1024), context_length=1024)
        expected = kvpolicy.DecodeRunner(on_cpu, cache).generate(prompt.cpu(), 200)
    finally:
        model.cuda()
    assert found == expected.tolist()


@pytest.mark.parametrize("shape", PLANS)
def test_bf16_is_as_near_to_fp32_as_torch_is(smollm2, shape):
    """Teacher-forced logits of 200 tokens: at most twice the error of torch's own path in bf16."""
    single, tokenizer = smollm2
    ids = prompt_of(tokenizer, 800, skip=3000)
    plan = plan_of(single, shape, 1024)
    with torch.no_grad():
        exact = stepped(single, kvpolicy.new_cache(single, plan, context_length=1024), ids, 600)
        half = kvpolicy.load_model("smollm2-135m", device="cuda", dtype="bfloat16")[0]
        runner = runner_of(half, plan=plan, context_length=1024)
        found = run(runner, ids, 600)
        assert runner.mode == "graph"
        half = half.cpu()
        torch_path = stepped(half, kvpolicy.new_cache(half, plan, context_length=1024), ids.cpu(), 600)
    error = (found.float() - exact).norm()
    allowed = (torch_path.float().cuda() - exact).norm()
    assert error <= 2 * allowed, f"{shape}: {error:.3f}, torch {allowed:.3f}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("context", [None, 512], ids=["growing", "fixed"])
def test_nothing_waits_nothing_grows_nothing_is_joined(policy, context, monkeypatch):
    """Across two looks at what is wrong with the scores, and two times that a budget grows."""
    model = tiny_model("Llama").cuda()
    runner = runner_of(model, policy=policy, allocator="uniform", retention=0.3, context_length=context)
    token = runner.prefill(tiny_ids(300).cuda()).argmax(-1)
    for _ in range(2):
        token = runner.step(token).argmax(-1)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    if context is not None:  # else a step may be recorded again, for which the model joins halves of its vectors
        monkeypatch.setattr(torch, "cat", lambda *_, **__: pytest.fail("tensors were joined"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(130):
            token = runner.step(token).argmax(-1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runner.mode == "graph"
    if context is not None:  # else the entries that a larger budget allows take memory
        assert torch.cuda.memory_allocated() == held


def test_a_forward_of_the_model_does_not_wait_either():
    """Whoever calls it: a loop that knows nothing of runners, and gives no positions."""
    model = tiny_model("Llama").cuda()
    cache = kvpolicy.new_cache(model, retention=0.3, context_length=512)
    with torch.no_grad():
        out = model(tiny_ids(300).cuda(), **over(cache))
        for step in range(66):
            if step == 2:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                out = model(out.logits[:, -1:].argmax(-1), **over(cache))
            except BaseException:
                torch.cuda.set_sync_debug_mode("default")
                raise
        torch.cuda.set_sync_debug_mode("default")
    assert cache.replays.mode == "graph"


def test_a_policy_that_goes_wrong_is_heard_of_without_waiting(monkeypatch):
    """In a loop of one's own within two looks, and at the end of a generation."""
    model, given = tiny_model("Llama").cuda(), torch.zeros((), device="cuda")
    policy = kvpolicy.registry.get("policy", "h2o")()
    own = type(policy).score_step
    monkeypatch.setattr(type(policy), "score_step", lambda self, step: own(self, step) + given)
    runner = runner_of(model, policy=policy, allocator="uniform", retention=0.3, context_length=512)
    token, fed = runner.prefill(tiny_ids(300).cuda()).argmax(-1), 0
    given.fill_(float("nan"))
    with pytest.raises(kvpolicy.PluginError, match="NaN"):
        while fed < 200:
            runner.step(token)
            fed += 1
            torch.cuda.synchronize()
    assert 64 < fed < 128
    cache = kvpolicy.new_cache(model, policy=policy, allocator="uniform", retention=0.3, context_length=512)
    with pytest.raises(kvpolicy.PluginError, match="NaN"):
        kvpolicy.generate(model, cache, tiny_ids(300).cuda(), max_new_tokens=10, min_new_tokens=10)


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_layers_of_a_prompt_do_not_wait_for_the_device(policy):
    """The CPU has to stay ahead through a whole prompt: what it waits for does not grow with the layers.

    One of the waits comes before the first layer, when nothing runs: whether the model knows the tokens.
    """
    waits = []
    for layers in (2, 5):
        model = tiny_model("Llama", layers=layers).cuda()
        runner = runner_of(model, retention=0.3, context_length=512, policy=policy)
        runner.prefill(tiny_ids(100).cuda())
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                runner.prefill(tiny_ids(100).cuda())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(each.message) for each in told))
    assert waits[0] == waits[1] <= 5, waits


@pytest.mark.parametrize("turns", [1, 2])
def test_sampling_goes_on_behind_a_recording_that_failed(turns, monkeypatch):
    """A layer that waits for the device cannot be recorded; the random numbers of the device are left whole."""
    model, ids = tiny_model("Llama").cuda(), tiny_ids(50).cuda()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def waiting(x):
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return forward(x)

    def sampled():
        cache = kvpolicy.new_cache(model, retention=0.4, min_tokens=8)
        torch.manual_seed(0)
        options = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": None}
        return cache, [kvpolicy.generate(model, cache, ids, **options).tolist() for _ in range(turns)]

    with no_graphs(monkeypatch):
        _, expected = sampled()
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", waiting)
        with pytest.warns(kvpolicy.GraphWarning, match="without a CUDA graph"):
            cache, found = sampled()
    assert cache.replays.mode == "eager"
    assert found == expected
    cache, found = sampled()
    assert cache.replays.mode == "graph"
    assert found == expected
