"""Everything generate can do, over a ragged cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, ModelError, ModelSpec
from tests.integrations.ragged_oracle import ragged_table, stepped_logits
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam samples": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "chunked prefill": {"prefill_chunk_size": 7, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
}


@pytest.fixture
def llama():
    return tiny_model("Llama")


def ragged_plan(model, low=5, high=20, context_length=64):
    spec = ModelSpec.from_config(model.config)
    return BudgetPlan.from_capacities(spec, ragged_table(spec, low, high), context_length)


def generated(model, ids, cache, new_tokens=16, **options):
    torch.manual_seed(3)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **over(cache), max_new_tokens=new_tokens, **options)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_stock_cache(llama, mode):
    ids = tiny_ids(30, batch=1 if mode == "prompt lookup" else 2)
    expected = generated(llama, ids, DynamicCache(config=llama.config), **MODES[mode])
    assert torch.equal(generated(llama, ids, kvpolicy.new_cache(llama, retention=1.0), **MODES[mode]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_smollm2_gives_the_tokens_of_the_stock_cache(smollm2, mode):
    model, tokenizer = smollm2
    text = "The quick brown fox jumps over the lazy dog. The quick brown fox sleeps. The quick"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = generated(model, ids, DynamicCache(config=model.config), 12, **MODES[mode])
    try:
        assert torch.equal(generated(model, ids, kvpolicy.new_cache(model, retention=1.0), 12, **MODES[mode]), expected)
    finally:
        kvpolicy.detach(model)


def test_smollm2_as_its_own_assistant_gives_the_tokens_of_the_stock_cache(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("One two three four, one two three", return_tensors="pt").input_ids
    expected = generated(model, ids, DynamicCache(config=model.config), 12, assistant_model=model, do_sample=False)
    try:
        cache = kvpolicy.new_cache(model, retention=1.0)
        assert torch.equal(generated(model, ids, cache, 12, assistant_model=model, do_sample=False), expected)
    finally:
        kvpolicy.detach(model)


def test_assisted_generation_gives_the_tokens_of_the_stock_cache(llama):
    ids, assistant = tiny_ids(30), tiny_model("Llama", layers=1)
    expected = generated(llama, ids, DynamicCache(config=llama.config), assistant_model=assistant, do_sample=False)
    cache = kvpolicy.new_cache(llama, retention=1.0)
    assert torch.equal(generated(llama, ids, cache, assistant_model=assistant, do_sample=False), expected)
    # the model itself as its own assistant: its stock cache runs under our attention in between
    assert torch.equal(
        generated(llama, ids, kvpolicy.new_cache(llama, retention=1.0), assistant_model=llama, do_sample=False),
        expected,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_generates_under_a_budget(name):
    model, ids = tiny_model(name, attention=attention_of(name)), tiny_ids(40, batch=2)
    cache = kvpolicy.new_cache(model, ragged_plan(model), context_length=64)
    out = generated(model, ids, cache, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 56) and cache.get_seq_length() == 55
    assert torch.equal(cache.lengths, cache.capacities) and int(cache.lengths.max()) <= 20
    again = kvpolicy.new_cache(model, ragged_plan(model), context_length=64)
    assert torch.equal(generated(model, ids, again, do_sample=False, eos_token_id=None), out)
    kvpolicy.detach(model)


def test_assisted_generation_holds_at_most_the_rollback_above_the_capacity(llama):
    ids = tiny_ids(80)
    cache = kvpolicy.new_cache(llama, ragged_plan(llama), context_length=64, rollback=8)
    above = []
    hook = llama.register_forward_hook(lambda *_: above.append(int((cache.lengths - cache.capacities).max())))
    generated(llama, ids, cache, 20, prompt_lookup_num_tokens=3, do_sample=False)
    hook.remove()
    assert max(above) == 8
    with pytest.raises(BudgetError, match="cannot be taken back"):
        cache.crop(-20)
    cache.stop_recording()
    with torch.no_grad():
        llama(ids[:, :3], **over(cache))
    assert torch.equal(cache.lengths, cache.capacities)


def after_detour(model, wrong, **options):
    """(cache that never saw `wrong` tokens, cache that took them back), each after the same tokens otherwise."""
    ids, caches = tiny_ids(44), []
    for detour in (ids[:, 40:], torch.cat([ids[:, 40:], wrong], 1)):
        cache = kvpolicy.new_cache(model, rollback=16, **options)
        cache.activate_past_recording()
        stepped_logits(model, ids[:, :40], cache, [40])
        stepped_logits(model, detour, cache, [detour.shape[1]])
        cache.crop(-(detour.shape[1] - 4))
        caches.append(cache)
    return caches


def test_tokens_taken_back_were_never_there(llama):
    straight, detour = after_detour(llama, torch.full((1, 6), 7), retention=1.0)
    expected = stepped_logits(llama, tiny_ids(9), straight, [6, 1, 1, 1])
    torch.testing.assert_close(stepped_logits(llama, tiny_ids(9), detour, [6, 1, 1, 1]), expected, rtol=0, atol=1e-6)


def test_tokens_taken_back_evict_nobody(llama):
    """Above its capacity a cache may hold more or less after a detour; what the capacity is for is the same."""
    caches = after_detour(llama, torch.full((1, 6), 7), plan=ragged_plan(llama), context_length=64)
    kept = []
    for cache in caches:
        cache.stop_recording()
        stepped_logits(llama, tiny_ids(1), cache, [1])
        assert torch.equal(cache.lengths, cache.capacities)
        kept.append([sorted(x.tolist()) for layer in range(3) for x in cache.store.positions(layer)])
    assert kept[0] == kept[1]


def test_beams_carry_their_own_capacities(llama):
    """Two prompts of different length x 3 beams under budgets that follow each row's own length."""
    short, long = tiny_ids(12), tiny_ids(40)
    ids = torch.cat([torch.nn.functional.pad(short, (28, 0)), long])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(short), (28, 0)), torch.ones_like(long)])
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 10, "eos_token_id": None}

    def run(rows, row_mask):
        cache = kvpolicy.new_cache(llama, retention=0.4, min_tokens=8)
        return llama.generate(rows, attention_mask=row_mask, **over(cache), **options), cache

    both, cache = run(ids, mask)
    assert cache.capacities.shape[1] == 6
    assert int(cache.capacities[:, 0].sum()) < int(cache.capacities[:, 5].sum())
    for row, prompt in enumerate((short, long)):
        alone, own = run(prompt, torch.ones_like(prompt))
        assert torch.equal(both[row, -10:], alone[0, -10:])
        assert torch.equal(cache.lengths[:, 3 * row], own.lengths[:, 0])


def test_linear_layers_go_with_their_beams_and_are_reset():
    model, ids = tiny_model("Qwen3Next"), tiny_ids(20, batch=2)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
    expected = model.generate(ids, **over(DynamicCache(config=model.config)), **options)
    cache = kvpolicy.new_cache(model, retention=1.0)
    assert torch.equal(model.generate(ids, **over(cache), **options), expected)
    cache.reset()
    assert torch.equal(model.generate(ids, **over(cache), **options), expected)


def test_rows_can_be_selected_and_repeated(llama):
    ids = tiny_ids(40, batch=3)
    more = tiny_ids(12, batch=1).expand(4, -1)
    plan = ragged_plan(llama)
    cache = kvpolicy.new_cache(llama, plan, context_length=64)
    stepped_logits(llama, ids, cache, [40])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert cache.lengths.shape[1] == 4
    got = stepped_logits(llama, more, cache, [1] * 12)
    for row, source in enumerate([2, 2, 0, 0]):
        alone = kvpolicy.new_cache(llama, plan, context_length=64)
        stepped_logits(llama, ids[source : source + 1], alone, [40])
        expected = stepped_logits(llama, more[:1], alone, [1] * 12)
        torch.testing.assert_close(got[row : row + 1], expected, rtol=0, atol=1e-5)


def test_a_copy_goes_its_own_way(llama):
    ids = tiny_ids(60)
    plan = ragged_plan(llama)
    cache = kvpolicy.new_cache(llama, plan, context_length=64)
    stepped_logits(llama, ids[:, :40], cache, [40])
    branch = copy.deepcopy(cache)
    stepped_logits(llama, tiny_ids(9), branch, [9])
    assert branch.get_seq_length() == 49 and cache.get_seq_length() == 40
    again = kvpolicy.new_cache(llama, plan, context_length=64)
    stepped_logits(llama, ids[:, :40], again, [40])
    torch.testing.assert_close(
        stepped_logits(llama, ids[:, 40:], cache, [1] * 20),
        stepped_logits(llama, ids[:, 40:], again, [1] * 20),
        rtol=0,
        atol=0,
    )


def test_a_cache_can_be_reset(llama):
    ids = tiny_ids(50)
    cache = kvpolicy.new_cache(llama, ragged_plan(llama), context_length=64)
    first = stepped_logits(llama, ids, cache, [30, *[1] * 20])
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    torch.testing.assert_close(stepped_logits(llama, ids, cache, [30, *[1] * 20]), first, rtol=0, atol=0)


# --- conversations


def test_a_conversation_goes_on_with_new_tokens_alone(llama):
    turns = [tiny_ids(30), tiny_ids(11), tiny_ids(25)]
    cache = kvpolicy.new_cache(llama, retention=1.0)
    said = torch.zeros(1, 0, dtype=torch.long)
    for turn in turns:
        out = kvpolicy.generate(llama, cache, turn, max_new_tokens=9, do_sample=False)
        assert torch.equal(out[:, : turn.shape[1]], turn)
        said = torch.cat([said, turn], 1)
        expected = generated(llama, said, DynamicCache(config=llama.config), 9, do_sample=False)
        said = torch.cat([said, out[:, turn.shape[1] :]], 1)
        assert torch.equal(said, expected)


def test_a_conversation_is_compressed_at_every_turn(llama):
    cache = kvpolicy.new_cache(llama, ragged_plan(llama), context_length=64)
    for length in (30, 25, 1, 40):
        kvpolicy.generate(llama, cache, tiny_ids(length), max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(cache.lengths, cache.capacities)
    assert cache.get_seq_length() == 30 + 25 + 1 + 40 + 4 * 5 - 1


def test_a_padded_conversation_goes_on(llama):
    ids = torch.cat([torch.nn.functional.pad(tiny_ids(8), (12, 0)), tiny_ids(20)])
    mask = (torch.arange(20)[None] >= torch.tensor([12, 0])[:, None]).long()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cache = kvpolicy.new_cache(llama, retention=1.0)
    first = kvpolicy.generate(llama, cache, ids, mask, **options)
    second = kvpolicy.generate(llama, cache, tiny_ids(7, batch=2), **options)
    for row, length in enumerate((8, 20)):
        alone = kvpolicy.new_cache(llama, retention=1.0)
        out = kvpolicy.generate(llama, alone, tiny_ids(length), **options)
        assert torch.equal(out[0, -6:], first[row, -6:])
        out = kvpolicy.generate(llama, alone, tiny_ids(7, batch=2)[row : row + 1], **options)
        assert torch.equal(out[0], second[row])


def test_prompt_lookup_in_a_conversation(llama):
    cache = kvpolicy.new_cache(llama, retention=1.0)
    first = kvpolicy.generate(llama, cache, tiny_ids(30), max_new_tokens=9, prompt_lookup_num_tokens=3, do_sample=False)
    assert not cache.recording
    second = kvpolicy.generate(llama, cache, tiny_ids(11), max_new_tokens=9, do_sample=False)
    said = torch.cat([first, tiny_ids(11)], 1)
    expected = generated(llama, said, DynamicCache(config=llama.config), 9, do_sample=False)
    assert torch.equal(expected[:, first.shape[1] :], second)


def test_what_cannot_go_on_is_refused(llama):
    cache = kvpolicy.new_cache(llama, retention=1.0)
    kvpolicy.generate(llama, cache, tiny_ids(10), num_beams=2, max_new_tokens=4, do_sample=False)
    with pytest.raises(ModelError, match="its rows are beams"):
        kvpolicy.generate(llama, cache, tiny_ids(10), max_new_tokens=4)
    cache = kvpolicy.new_cache(llama, retention=1.0)
    kvpolicy.generate(llama, cache, tiny_ids(10), max_new_tokens=4)
    with pytest.raises(ModelError, match="holds 1 sequences, got tokens for 2"):
        kvpolicy.generate(llama, cache, tiny_ids(10, batch=2), max_new_tokens=4)
    with pytest.raises(ModelError, match="prefill_chunk_size is for the first prompt"):
        kvpolicy.generate(llama, cache, tiny_ids(10), max_new_tokens=4, prefill_chunk_size=4)
    with pytest.raises(ModelError, match="not as past_key_values"):
        kvpolicy.generate(llama, cache, tiny_ids(10), past_key_values=cache)


def test_rows_that_ended_at_different_times_are_refused(llama):
    ids = tiny_ids(20, batch=2)
    free = generated(llama, ids, DynamicCache(config=llama.config), 12, do_sample=False, eos_token_id=None)[:, 20:]
    end = next(token for token in free[0].tolist() if token not in free[1].tolist())
    cache = kvpolicy.new_cache(llama, retention=1.0)
    kvpolicy.generate(llama, cache, ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)
    with pytest.raises(ModelError, match="ended earlier than others"):
        kvpolicy.generate(llama, cache, tiny_ids(5, batch=2), max_new_tokens=4)


def test_recording_can_end_without_taking_anything_back():
    model, ids = tiny_model("Gemma3Window"), tiny_ids(70)
    expected = stepped_logits(model, ids, kvpolicy.new_cache(model, retention=1.0), [60, 10])
    cache = kvpolicy.new_cache(model, retention=1.0)
    cache.activate_past_recording()
    first = stepped_logits(model, ids[:, :60], cache, [60])
    cache.stop_recording()
    got = torch.cat([first, stepped_logits(model, ids[:, 60:], cache, [10])], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# --- attached


def test_attached_supplies_caches_to_generate(llama):
    ids, plan = tiny_ids(40, batch=2), ragged_plan(llama)
    expected = generated(llama, ids, kvpolicy.new_cache(llama, plan, context_length=64), do_sample=False)
    kvpolicy.detach(llama)
    with kvpolicy.attached(llama, plan, context_length=64):
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, return_dict_in_generate=True
        )
    assert torch.equal(out.sequences, expected)
    assert isinstance(out.past_key_values, kvpolicy.RaggedCache)
    assert int(out.past_key_values.lengths.max()) <= 20
    assert llama.config._attn_implementation == "sdpa"


def test_attached_supplies_caches_to_a_pipeline(tiny_checkpoint):
    from transformers import pipeline

    model, tokenizer = kvpolicy.load_model(str(tiny_checkpoint))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    seen = []
    with kvpolicy.attached(model, retention=0.5, min_tokens=8):
        hook = model.register_forward_hook(lambda _, __, out: seen.append(out.past_key_values))
        pipe("one two three four five six seven eight nine ten " * 4, max_new_tokens=5, do_sample=False)
        hook.remove()
    assert len(set(map(id, seen))) == 1 and isinstance(seen[0], kvpolicy.RaggedCache)
    assert int(seen[0].lengths.max()) < int(seen[0].store.seen.max())


def test_attached_refuses_what_it_cannot_exchange(llama):
    ids = tiny_ids(20)
    static = StaticCache(config=llama.config, max_cache_len=64)
    with torch.no_grad(), kvpolicy.attached(llama, retention=0.5):
        with pytest.raises(ModelError, match="a StaticCache was given"):
            llama(ids, **over(static))
        with pytest.raises(ModelError, match="a cache that offloads was given"):
            llama(ids, **over(DynamicCache(config=llama.config, offloading=True)))
        with pytest.raises(BudgetError, match="Assisted generation"):
            llama.generate(tiny_ids(300), max_new_tokens=20, prompt_lookup_num_tokens=3, do_sample=False)
    assert llama.config._attn_implementation == "sdpa"
    with pytest.raises(BudgetError, match="above 0 and at most 1"), kvpolicy.attached(llama, retention=2.0):
        pass
    assert llama.config._attn_implementation == "sdpa"


def test_attached_without_a_budget_leaves_stock_caches_alone(llama):
    ids = tiny_ids(20)
    expected = generated(llama, ids, DynamicCache(config=llama.config), do_sample=False)
    static = StaticCache(config=llama.config, max_cache_len=64)
    with kvpolicy.attached(llama):
        assert torch.equal(llama.generate(ids, max_new_tokens=16, do_sample=False), expected)
        assert torch.equal(generated(llama, ids, static, do_sample=False), expected)
        with kvpolicy.attached(llama):
            pass
        assert llama.config._attn_implementation != "sdpa", "the inner context leaves the outer one attached"


def test_quantised_weights_work(llama):
    """Nothing on the run path reads a weight."""

    class Quantised(torch.nn.Module):
        """Eight-bit weights, as quantised linear layers hold them: no attribute `weight` in floating point."""

        def __init__(self, linear):
            super().__init__()
            self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
            self.packed = (linear.weight.detach() / self.scale).round().to(torch.int8)

        def forward(self, x):
            return x @ (self.packed.float() * self.scale).T

    for block in llama.model.layers:
        for parent, name in [(block.self_attn, x) for x in ("q_proj", "k_proj", "v_proj", "o_proj")]:
            setattr(parent, name, Quantised(getattr(parent, name)))
    ids = tiny_ids(30)
    expected = generated(llama, ids, DynamicCache(config=llama.config), do_sample=False)
    assert torch.equal(generated(llama, ids, kvpolicy.new_cache(llama, retention=1.0), do_sample=False), expected)
