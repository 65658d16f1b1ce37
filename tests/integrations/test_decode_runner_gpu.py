"""Decoding in a CUDA graph: the same tokens as without, whatever came before, and nothing waits or grows."""

import warnings

import pytest
import torch

import kvpolicy
from tests.integrations.test_decode_runner import CONTEXT, stepped
from tests.tiny import attention_of, over, tiny_ids, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # torch's compiler, of itself
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # one that inductor begins with
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning"),
]


@pytest.fixture(scope="module")
def smollm2():
    return kvpolicy.load_model("smollm2-135m", device="cuda", dtype="float32")


def runner_of(model, *, compiled=False, **options):
    """A runner that was captured, and compiled if it was to be: a fall-back is an error."""
    runner = kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, static=True, **options), compiled=compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kvpolicy.GraphWarning)
        runner.prefill(tiny_ids(20).cuda())
    assert runner.mode == "graph"
    return runner


def check_architecture(name, make):
    """Two prompts, behind the first of which more has been decoded than the second holds."""
    model, ids = tiny_model(name, attention=attention_of(name)).cuda(), tiny_ids(72).cuda()
    options = {"policy": "snapkv", "allocator": "uniform", "retention": 0.5, "context_length": CONTEXT}
    runner = make(model, **options)
    for prompt in (50, 12):
        with torch.no_grad():
            expected = stepped(model, kvpolicy.new_cache(model, **options), ids, prompt)
            logits = [runner.prefill(ids[:, :prompt])]
            logits += [runner.step(ids[:, column]).clone() for column in range(prompt, 72)]
        torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Phi3", "Gemma2"])
def test_architectures(name, compiled):
    check_architecture(name, lambda model, **options: runner_of(model, compiled=compiled, **options))


@pytest.mark.parametrize("name", ["GptOss", "Gemma3n", "Gemma3Window", "Llama4", "Qwen3Next"])
@pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")
def test_architectures_that_may_fall_back(name):
    """Some models copy from the CPU in every step, or count in Python. The logits are right all the same."""

    def make(model, **options):
        return kvpolicy.DecodeRunner(model, kvpolicy.new_cache(model, static=True, **options))

    check_architecture(name, make)


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


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_one_graph_for_three_prompts(smollm2, policy):
    """600 tokens behind each, across evictions; memory that is free between them is poisoned."""
    model, tokenizer = smollm2
    options = {"plan": plan_of(model, "ragged", 1024), "context_length": 1024, "policy": policy}
    runner = runner_of(model, **options)
    for length in (900, 150, 500):
        prompt = prompt_of(tokenizer, length, skip=length)
        cache = kvpolicy.new_cache(model, **options)
        expected = model.generate(
            prompt, **over(cache), max_new_tokens=600, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert runner.generate(prompt, 600).tolist() == expected.tolist()
        assert torch.equal(runner.cache.lengths, cache.lengths.cpu())
        for name in ("keys", "values"):
            getattr(runner.cache.static, name).fill_(float("nan"))


@pytest.mark.parametrize("shape", PLANS)
def test_tokens_of_the_torch_path(smollm2, shape):
    """Against the ragged cache on the CPU, where everything is torch's: 200 tokens in fp32."""
    model, tokenizer = smollm2
    prompt = prompt_of(tokenizer, 600, skip=2000)
    runner = runner_of(model, plan=plan_of(model, shape, 1024), context_length=1024)
    found = runner.generate(prompt, 200).tolist()
    with torch.no_grad():
        on_cpu = model.cpu()
        cache = kvpolicy.new_cache(on_cpu, plan_of(on_cpu, shape, 1024), context_length=1024)
        expected = on_cpu.generate(
            prompt.cpu(), **over(cache), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
        )
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
        found = [runner.prefill(ids[:, :600])]
        found += [runner.step(ids[:, column]).clone() for column in range(600, 800)]
        half = half.cpu()
        torch_path = stepped(half, kvpolicy.new_cache(half, plan, context_length=1024), ids.cpu(), 600)
    error = (torch.stack(found, 1).float() - exact).norm()
    allowed = (torch_path.float().cuda() - exact).norm()
    assert error <= 2 * allowed, f"{shape}: {error:.3f}, torch {allowed:.3f}"


def test_nothing_waits_nothing_grows_nothing_is_joined():
    model = tiny_model("Llama").cuda()
    runner = runner_of(model, retention=0.3, context_length=512)
    logits = runner.prefill(tiny_ids(100).cuda())
    token = runner.step(logits.argmax(-1)).argmax(-1)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(64):
            token = runner.step(token).argmax(-1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(64):
            token = runner.step(token).argmax(-1)
    names = {event.name for event in profile.events()}
    assert "aten::argmax" in names, "the profile has seen the loop"
    assert "aten::cat" not in names


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


def test_generate_compiles_it():
    """transformers' own path on CUDA: `generate` compiles the step of a static cache by itself."""
    model, ids = tiny_model("Llama").cuda(), tiny_ids(50).cuda()
    options = {"retention": 0.4, "context_length": CONTEXT}
    arguments = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **over(kvpolicy.new_cache(model, **options)), **arguments)
    counters = torch._dynamo.utils.counters
    counters.clear()
    cache = kvpolicy.new_cache(model, static=True, **options)
    for _ in range(2):
        cache.reset()
        assert model.generate(ids, **over(cache), **arguments).tolist() == expected.tolist()
    assert counters["stats"]["unique_graphs"] == 1
