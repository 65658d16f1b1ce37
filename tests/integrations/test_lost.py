"""Where the budget or the cache could be lost: wrappers, options that drop the cache, and forwards that break off."""

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache

import kvpolicy
from kvpolicy import ModelError
from kvpolicy.cache import store_decoding
from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.step import PlannedStep
from tests.integrations.recording import record_on_cpu
from tests.tiny import over, tiny_ids, tiny_model

# peft 0.21 still asks for the old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
BUDGET = {"retention": 0.3, "min_tokens": 16}


@pytest.fixture
def llama():
    return tiny_model("Llama")


@pytest.fixture
def small_cache(llama):
    return kvpolicy.new_cache(llama, **BUDGET)


def lora(model):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


# --- wrappers


@pytest.mark.parametrize("wrap", [lora, compiled])
def test_attached_supplies_caches_inside_a_wrapper(llama, wrap):
    model = wrap(llama)
    with kvpolicy.attached(model, **BUDGET):
        out = model.generate(input_ids=tiny_ids(100), return_dict_in_generate=True, **OPTIONS)
    cache = out.past_key_values
    assert isinstance(cache, kvpolicy.RaggedCache) and cache.get_seq_length() == 107
    assert int(cache.lengths.max()) <= 32
    assert llama.config._attn_implementation == "sdpa"
    mine = kvpolicy.new_cache(model, **BUDGET)
    assert torch.equal(kvpolicy.generate(model, mine, tiny_ids(100), **OPTIONS), out.sequences)


def test_a_peft_model_called_directly_is_supplied_too(llama):
    model = lora(llama)  # its forward calls the model's forward, past the hooks of the model
    with torch.no_grad(), kvpolicy.attached(model, **BUDGET):
        cache = model(input_ids=tiny_ids(100)).past_key_values
    assert isinstance(cache, kvpolicy.RaggedCache) and int(cache.lengths.max()) < 100


@pytest.mark.parametrize(
    ("config", "name"), [(PromptTuningConfig, "prompt_tuning"), (PrefixTuningConfig, "prefix_tuning")]
)
def test_virtual_tokens_are_refused_by_name(llama, config, name):
    model = get_peft_model(llama, config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with pytest.raises(ModelError, match=name):
        kvpolicy.new_cache(model, **BUDGET)
    with pytest.raises(ModelError, match=name), kvpolicy.attached(model, **BUDGET):
        pass
    cache = kvpolicy.new_cache(llama, **BUDGET)
    with pytest.raises(ModelError, match=name):
        kvpolicy.generate(model, cache, tiny_ids(100), **OPTIONS)
    assert cache.get_seq_length() == 0


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match="got a Linear, expected a model of transformers"):
        kvpolicy.new_cache(torch.nn.Linear(2, 2), **BUDGET)


# --- options that drop the cache


def test_a_generation_config_without_a_cache_does_not_switch_ours_off(llama, small_cache):
    expected = kvpolicy.generate(llama, kvpolicy.new_cache(llama, **BUDGET), tiny_ids(100), **OPTIONS)
    llama.generation_config.use_cache = False
    assert torch.equal(kvpolicy.generate(llama, small_cache, tiny_ids(100), **OPTIONS), expected)
    assert small_cache.get_seq_length() == 107


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_generation_config_with_another_cache_does_not_replace_ours(llama, small_cache, kind):
    llama.generation_config.cache_implementation = kind
    kvpolicy.generate(llama, small_cache, tiny_ids(100), **OPTIONS)
    assert small_cache.get_seq_length() == 107


@pytest.mark.parametrize("option", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_an_argument_against_the_cache_is_refused(llama, small_cache, option):
    with pytest.raises(ModelError, match=f"leave {next(iter(option))}="):
        kvpolicy.generate(llama, small_cache, tiny_ids(100), **OPTIONS, **option)
    assert small_cache.get_seq_length() == 0


def test_attached_refuses_to_run_without_a_cache(llama):
    with torch.no_grad(), kvpolicy.attached(llama, **BUDGET), pytest.raises(ModelError, match="use_cache=False"):
        llama.generate(tiny_ids(100), use_cache=False, **OPTIONS)


@pytest.mark.parametrize("new_tokens", [1, 8])
@pytest.mark.parametrize("budget", [{}, BUDGET])
def test_a_static_cache_in_attached_works_or_is_refused(llama, new_tokens, budget):
    options, ids = {**OPTIONS, "max_new_tokens": new_tokens}, tiny_ids(100)
    expected = llama.generate(ids, **options)
    with kvpolicy.attached(llama, **budget):
        if budget:
            with pytest.raises(ModelError, match=r"StaticCache"):
                llama.generate(ids, cache_implementation="static", **options)
        else:
            assert torch.equal(llama.generate(ids, cache_implementation="static", **options), expected)


def test_attached_refuses_a_cache_that_was_exchanged_before(llama):
    stock = DynamicCache(config=llama.config)
    with torch.no_grad(), kvpolicy.attached(llama, **BUDGET):
        llama(tiny_ids(100), **over(stock))
        with pytest.raises(ModelError, match="came again"):
            llama(tiny_ids(1), **over(stock))


def drop_the_cache(model):
    """As gradient checkpointing does, and models that prepare their inputs in ways of their own."""

    def without(_, args, given):
        return args, {name: None if isinstance(x, transformers.Cache) else x for name, x in given.items()}

    return [layer.register_forward_pre_hook(without, with_kwargs=True) for layer in model.model.layers]


def test_a_model_that_drops_the_cache_is_noticed(llama, small_cache):
    drop_the_cache(llama)
    with pytest.raises(ModelError, match="asked for a mask of 100 tokens, and they never came"):
        llama.generate(tiny_ids(100), **over(small_cache), **OPTIONS)
    cache = kvpolicy.new_cache(llama, **BUDGET)
    with pytest.raises(ModelError, match="saw 0 tokens, but 100 had to be fed"):
        kvpolicy.generate(llama, cache, tiny_ids(100), **{**OPTIONS, "max_new_tokens": 1})
    with kvpolicy.attached(llama, **BUDGET), pytest.raises(ModelError, match="no cache reached its attention"):
        llama.generate(tiny_ids(100), **OPTIONS)


def test_gradient_checkpointing_holds_the_budget_or_says_so(llama, small_cache):
    llama.train()
    llama.gradient_checkpointing_enable() if not hasattr(
        llama, "activation_checkpointing_enable"
    ) else llama.activation_checkpointing_enable()
    try:
        kvpolicy.generate(llama, small_cache, tiny_ids(100), **OPTIONS)
    except ModelError as error:
        assert "gradient checkpointing" in str(error)
    else:
        assert small_cache.get_seq_length() == 107 and int(small_cache.lengths.max()) <= 32


def longrope():
    """A Phi-3 that drops its cache when the first 64 tokens are passed."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    length = {"original_max_position_embeddings": 64}
    return tiny_model("Phi3", rope_parameters=rope | length, **length)


@pytest.mark.parametrize("how", ["generate", "model.generate", "attached"])
def test_a_model_that_drops_its_cache_on_the_way_is_stopped(how):
    model, ids = longrope(), tiny_ids(60)

    def run(new_tokens):
        options = {**OPTIONS, "max_new_tokens": new_tokens}
        cache = kvpolicy.new_cache(model, **BUDGET)
        if how == "generate":
            kvpolicy.generate(model, cache, ids, **options)
        elif how == "model.generate":
            model.generate(ids, **over(cache), **options)
        else:
            with kvpolicy.attached(model, **BUDGET):
                cache = model.generate(ids, return_dict_in_generate=True, **options).past_key_values
        return cache

    assert run(5).get_seq_length() == 64
    with pytest.raises(ModelError, match="cannot go on with a cache beyond 64 tokens"):
        run(6)


def test_such_a_model_is_stopped_where_tokens_could_be_replays_too(monkeypatch):
    record_on_cpu(monkeypatch)
    model = longrope()
    cache = kvpolicy.new_cache(model, **BUDGET)
    with pytest.raises(ModelError, match="cannot go on with a cache beyond 64 tokens"):
        model.generate(tiny_ids(60), **over(cache), **OPTIONS)
    assert cache.get_seq_length() == 64
    assert cache.replays.why == "the model drops its cache beyond 64 tokens"


def test_a_model_that_would_drop_its_cache_keeps_it_behind_a_long_prompt():
    model, ids = longrope(), tiny_ids(100)
    expected = model.generate(ids, **OPTIONS)
    assert torch.equal(kvpolicy.generate(model, kvpolicy.new_cache(model, retention=1.0), ids, **OPTIONS), expected)
    cache = kvpolicy.new_cache(model, **BUDGET)
    model.generate(ids, **over(cache), **OPTIONS)
    assert cache.get_seq_length() == 107 and int(cache.lengths.max()) <= 32


# --- forwards that break off


class Stop(BaseException):
    pass


def stop(*_):
    raise Stop


PLACES = {
    "before the first attention": lambda model: model.model.layers[0].self_attn.register_forward_pre_hook(stop),
    "in the first layer": lambda model: model.model.layers[0].mlp.register_forward_hook(stop),
    "between update and attention": lambda model: model.model.layers[1].self_attn.o_proj.register_forward_hook(stop),
    "behind the second layer": lambda model: model.model.layers[1].register_forward_hook(stop),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("policy", ["snapkv", "streaming"])
def test_a_forward_that_broke_off_is_named_at_the_next_use(llama, tmp_path, place, count, policy):
    cache = kvpolicy.new_cache(llama, policy=policy, **BUDGET)
    with torch.no_grad():
        llama(tiny_ids(60), **over(cache))
        hook = PLACES[place](llama)
        with pytest.raises(Stop):
            llama(tiny_ids(count), **over(cache))
        hook.remove()
        if place == "before the first attention":  # nothing has happened
            llama(tiny_ids(count), **over(cache))
            assert cache.get_seq_length() == 60 + count and cache.report()
            return
        for use in (
            lambda: llama(tiny_ids(count), **over(cache)),
            cache.report,
            lambda: cache.lengths,
            lambda: cache.nbytes,
            lambda: cache.save(tmp_path / "cache"),
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: kvpolicy.generate(llama, cache, tiny_ids(3), **OPTIONS),
        ):
            with pytest.raises(ModelError, match="a forward broke off"):
                use()
        assert not (tmp_path / "cache").exists()
        cache.reset()
        fresh = kvpolicy.new_cache(llama, policy=policy, **BUDGET)
        logits = [llama(tiny_ids(60), **over(each)).logits for each in (cache, fresh)]
    assert torch.equal(*logits) and torch.equal(cache.lengths, fresh.lengths)


@pytest.mark.parametrize(
    ("policy", "method", "count"),
    [
        ("snapkv", "replace", 5),
        ("streaming", "replace", 5),
        ("snapkv", "write", 1),
        ("streaming", "write", 1),
        ("h2o", "write", 1),
        ("h2o", "append", 1),  # a token that is planned by none but its layers
        ("h2o", "reserve", 1),
    ],
)
def test_memory_that_runs_out_inside_the_store_is_named(llama, monkeypatch, policy, count, method):
    cache = kvpolicy.new_cache(llama, policy=policy, **BUDGET)
    work, calls = getattr(LayerArena, method), []

    def exhausted(arena, *args, **kwargs):
        calls.append(method)
        if len(calls) == 2:  # in the second layer
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(arena, *args, **kwargs)

    with torch.no_grad():
        llama(tiny_ids(60), **over(cache))
        with monkeypatch.context() as patch:
            patch.setattr(LayerArena, method, exhausted)
            if method in ("append", "reserve"):
                patch.setattr(store_decoding, "plan_step", lambda *args, **kwargs: PlannedStep())
            with pytest.raises(torch.OutOfMemoryError):
                llama(tiny_ids(count), **over(cache))
        with pytest.raises(ModelError, match="a forward broke off"):
            llama(tiny_ids(1), **over(cache))
        cache.reset()
        fresh = kvpolicy.new_cache(llama, policy=policy, **BUDGET)
        logits = [llama(tiny_ids(60), **over(each)).logits for each in (cache, fresh)]
    assert torch.equal(*logits)


def test_a_forward_that_broke_off_between_linear_layers_is_named():
    model = tiny_model("Qwen3Next", layers=4)
    cache = kvpolicy.new_cache(model, **BUDGET)
    with torch.no_grad():
        model(tiny_ids(60), **over(cache))
        hook = model.model.layers[1].register_forward_hook(stop)  # linear ones, before any with a budget
        with pytest.raises(Stop):
            model(tiny_ids(1), **over(cache))
        hook.remove()
        with pytest.raises(ModelError, match="a forward broke off"):
            model(tiny_ids(1), **over(cache))


def test_a_generation_that_broke_off_is_named(llama, small_cache, tmp_path):
    def stopping(ids, _):
        if ids.shape[1] == 104:
            raise Stop
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(Stop):
        kvpolicy.generate(llama, small_cache, tiny_ids(100), stopping_criteria=[stopping], **OPTIONS)
    for use in (
        lambda: kvpolicy.generate(llama, small_cache, tiny_ids(3), **OPTIONS),
        small_cache.report,
        lambda: small_cache.save(tmp_path / "cache"),
    ):
        with pytest.raises(ModelError, match="a generation over it ended with Stop"):
            use()
    small_cache.reset()
    kvpolicy.generate(llama, small_cache, tiny_ids(100), **OPTIONS)


def test_a_generation_that_did_not_begin_leaves_the_cache_as_it_was(llama, small_cache):
    first = kvpolicy.generate(llama, small_cache, tiny_ids(100), **OPTIONS)
    with pytest.raises(ValueError, match="not_an_option"):
        kvpolicy.generate(llama, small_cache, tiny_ids(3), not_an_option=1, **OPTIONS)
    assert kvpolicy.generate(llama, small_cache, tiny_ids(3), **OPTIONS).shape == (1, 11)
    assert small_cache.get_seq_length() == first.shape[1] + 10


def test_beams_end_a_conversation_also_where_all_of_them_are_returned(llama, small_cache):
    kvpolicy.generate(llama, small_cache, tiny_ids(40), num_beams=3, num_return_sequences=3, **OPTIONS)
    with pytest.raises(ModelError, match="beams"):
        kvpolicy.generate(llama, small_cache, tiny_ids(3, batch=3), **OPTIONS)
