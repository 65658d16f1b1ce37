"""Wrappers x modes x ways to generate: the budget holds, or an error of ours says why not. Never neither."""

import functools
import re

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import kvpolicy
from kvpolicy import KVPolicyError
from tests.tiny import over, tiny_ids, tiny_model

# peft 0.21 still asks for the old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
PROMPT, NEW = 60, 6
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
BUDGET = {"retention": 0.25, "min_tokens": 8, "rollback": 8}
MOST = round(0.25 * (PROMPT + NEW))


def checkpointing(model):
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def switched_off(model):
    model.generation_config.use_cache = False


def peft(config):
    return lambda model: get_peft_model(model, config).eval()


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "LoRA": peft(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)),
    "prompt tuning": peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
}
MODES = {
    "eval": lambda model: None,
    "train": lambda model: model.train(),
    "inference mode": lambda model: None,
    "no cache": switched_off,
    "gradient checkpointing": checkpointing,
}


def with_model_generate(model, ids, **options):
    cache = kvpolicy.new_cache(model, **BUDGET)
    model.generate(input_ids=ids, **over(cache), **OPTIONS, **options)
    return cache


def with_generate(model, ids, **options):
    cache = kvpolicy.new_cache(model, **BUDGET)
    kvpolicy.generate(model, cache, ids, **OPTIONS, **options)
    return cache


def with_attached(model, ids, **options):
    with kvpolicy.attached(model, **BUDGET):
        return model.generate(input_ids=ids, **OPTIONS, **options).past_key_values


def with_a_forward(model, ids):
    with kvpolicy.attached(model, **BUDGET):
        cache = model(input_ids=ids).past_key_values
        for step in range(NEW - 1):
            cache = model(input_ids=ids[:, step : step + 1], **over(cache)).past_key_values
    return cache


WAYS = {
    "model.generate": with_model_generate,
    "generate": with_generate,
    "attached": with_attached,
    "a loop": with_a_forward,
    "prompt lookup": functools.partial(with_generate, prompt_lookup_num_tokens=2),
    "prompt lookup, attached": functools.partial(with_attached, prompt_lookup_num_tokens=2),
    "beams": functools.partial(with_generate, num_beams=2),
    "beams, attached": functools.partial(with_attached, num_beams=2),
}
ASSISTED = re.compile("requires (a cache|`use_cache=True`)")  # what transformers says of it, 5.24 and 5.17
WORKS = {  # wherever nothing takes the cache away; the other combinations may be refused
    (wrapper, mode, way)
    for wrapper in ("plain", "compiled", "LoRA")
    for mode in ("eval", "train", "inference mode")
    for way in WAYS
    if way != "prompt lookup, attached"
}


def cases():
    """All of them; what a compiler has to trace takes most of a minute each."""
    for wrapper in WRAPPERS:
        slow = [pytest.mark.slow] if wrapper.startswith("compiled") else []
        yield from (pytest.param(wrapper, mode, marks=slow) for mode in MODES)


@pytest.mark.parametrize(("wrapper", "mode"), list(cases()))
def test_the_budget_holds_or_an_error_says_why(wrapper, mode):
    ids = tiny_ids(PROMPT)
    for way, run in WAYS.items():
        torch._dynamo.reset()
        model = WRAPPERS[wrapper](tiny_model("Llama", layers=2))
        MODES[mode](model)
        try:
            with torch.inference_mode() if mode == "inference mode" else torch.no_grad():
                cache = run(model, ids)
        except (KVPolicyError, RuntimeError, ValueError) as error:
            assert isinstance(error, KVPolicyError) or ASSISTED.search(str(error)), way
            assert (wrapper, mode, way) not in WORKS, way
            continue
        assert isinstance(cache, kvpolicy.RaggedCache), way
        assert cache.get_seq_length() == PROMPT + NEW - 1, way
        assert int(cache.lengths.max()) <= MOST + (BUDGET["rollback"] if "lookup" in way else 0), way  # the rollback
        assert cache.report().evicted, way
