"""The two oracles: a full budget equals dense attention, a ragged one a dense forward with a mask per KV head."""

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, ModelError, ModelSpec
from tests.integrations.ragged_oracle import masked_logits, ragged_table, stepped_logits, visible_tokens
from tests.tiny import attention_of, over, tiny_ids, tiny_model
from tests.tiny_architectures import ARCHITECTURES, REFUSED

STEPS = [40, 9] + [1] * 12 + [7] + [1] * 4
SINKS = 4


def fixed_cache(model, table, context_length, **options):
    """A cache under exactly this table."""
    plan = BudgetPlan.from_capacities(ModelSpec.from_config(model.config), table, context_length)
    return kvpolicy.new_cache(model, plan, context_length=context_length, **options)


def within_capacity(cache):
    assert bool((cache.lengths <= cache.capacities).all())


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    model = tiny_model(request.param, attention=attention_of(request.param))
    yield model
    kvpolicy.detach(model)


def test_a_full_budget_equals_the_stock_cache(architecture):
    ids = tiny_ids(sum(STEPS), batch=2)
    expected = stepped_logits(architecture, ids, DynamicCache(config=architecture.config), STEPS)
    cache = kvpolicy.new_cache(architecture, retention=1.0)
    got = stepped_logits(architecture, ids, cache, STEPS)
    with torch.no_grad():  # Gemma 4's stock cache differs from no cache by up to 5e-5 already
        rounding = float((architecture(ids, use_cache=False).logits - expected).abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=max(1e-5, rounding))
    assert not torch.equal(cache.lengths, torch.zeros_like(cache.lengths))
    assert bool((cache.lengths == sum(STEPS)).all())


def test_a_ragged_budget_equals_a_mask_per_head(architecture):
    ids = tiny_ids(sum(STEPS), batch=2)
    table = ragged_table(ModelSpec.from_config(architecture.config), SINKS + 1, 30)
    expected = masked_logits(architecture, ids, visible_tokens(table, SINKS, STEPS))
    cache = fixed_cache(architecture, table, 64)
    got = stepped_logits(architecture, ids, cache, STEPS, within_capacity)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(cache.lengths, table[:, None].expand(-1, 2, -1))


def test_what_is_evicted_matters(architecture):
    """The tests above could not fail if the models ignored their context."""
    ids = tiny_ids(sum(STEPS))
    spec = ModelSpec.from_config(architecture.config)
    ragged, other = ragged_table(spec, SINKS + 1, 30), ragged_table(spec, SINKS + 1, 30, seed=1)
    first = stepped_logits(architecture, ids, fixed_cache(architecture, ragged, 64), STEPS)
    second = stepped_logits(architecture, ids, fixed_cache(architecture, other, 64), STEPS)
    assert (first - second).abs().max() > 1e-3


def test_the_stock_cache_is_right_on_an_attached_model(architecture):
    ids = tiny_ids(60, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with torch.no_grad():
        before = architecture(ids, attention_mask=mask).logits
        stock = stepped_logits(architecture, ids, DynamicCache(config=architecture.config), [50, 1, 9])
        kvpolicy.attach(architecture)
        kvpolicy.attach(architecture)
        torch.testing.assert_close(architecture(ids, attention_mask=mask).logits, before, rtol=0, atol=0)
        again = stepped_logits(architecture, ids, DynamicCache(config=architecture.config), [50, 1, 9])
        torch.testing.assert_close(again, stock, rtol=0, atol=0)
        kvpolicy.detach(architecture)
        torch.testing.assert_close(architecture(ids, attention_mask=mask).logits, before, rtol=0, atol=0)


def test_another_model_is_not_touched():
    model, other, ids = tiny_model("Llama"), tiny_model("Llama", layers=2), tiny_ids(40)
    with torch.no_grad():
        before = other(ids).logits
        cache = kvpolicy.new_cache(model, retention=0.5, min_tokens=8)
        model(ids, **over(cache))
        torch.testing.assert_close(other(ids).logits, before, rtol=0, atol=0)
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_work_is_refused(name):
    with pytest.raises(ModelError):
        kvpolicy.new_cache(tiny_model(name, attention="eager"), retention=0.5)


def test_left_padded_rows_give_what_they_give_alone():
    model = tiny_model("Llama")
    table = ragged_table(ModelSpec.from_config(model.config), SINKS + 1, 20)
    prompts = [tiny_ids(length) for length in (40, 23, 6)]
    decoded = tiny_ids(14, batch=3)
    ids = torch.cat([torch.nn.functional.pad(x, (40 - x.shape[1], 0)) for x in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(x), (40 - x.shape[1], 0)) for x in prompts])
    batch = fixed_cache(model, table, 64)
    with torch.no_grad():
        parts = []
        for step in range(decoded.shape[1] + 1):
            positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
            parts.append(model(ids, attention_mask=mask, position_ids=positions, **over(batch)).logits[:, -1])
            within_capacity(batch)
            ids = decoded[:, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        for row, prompt in enumerate(prompts):
            whole = torch.cat([prompt, decoded[row : row + 1]], 1)
            alone = fixed_cache(model, table, 64)
            expected = stepped_logits(model, whole, alone, [prompt.shape[1], *[1] * decoded.shape[1]])
            got = torch.stack([part[row] for part in parts])
            torch.testing.assert_close(got, expected[0, prompt.shape[1] - 1 :], rtol=0, atol=1e-5)
            assert torch.equal(alone.lengths[:, 0], batch.lengths[:, row])


def test_columns_of_padding_alone_stay_columns():
    """Where every token of a padded prompt was taken back, and where its first chunk had none."""
    model, ids = tiny_model("Llama"), tiny_ids(20, batch=2)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kvpolicy.attach(model)

    def fed(cache, begin, end):
        options = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        return model(ids[:, begin:end], **over(cache), **options).logits

    with torch.no_grad():
        expected = fed(DynamicCache(config=model.config), 0, 20)[:, 3:]
        for first in (3, 6):
            cache = kvpolicy.new_cache(model, retention=1.0)
            fed(cache, 0, first)
            cache.crop(3 - first)
            torch.testing.assert_close(fed(cache, 3, 20), expected, rtol=0, atol=1e-5)
            assert cache.get_seq_length() == 20 and cache.store.seen.tolist() == [17, 17]


def test_two_caches_on_one_model_do_not_meet():
    model, ids = tiny_model("Llama"), tiny_ids(50, batch=2)
    table = ragged_table(ModelSpec.from_config(model.config), SINKS + 1, 20)
    expected = [stepped_logits(model, row[None], fixed_cache(model, table, 64), [30, *[1] * 20]) for row in ids]
    caches = [fixed_cache(model, table, 64) for _ in ids]
    with torch.no_grad():
        for part in torch.split(ids, [30, *[1] * 20], 1):
            logits = [model(part[row][None], **over(caches[row])).logits[0, -1] for row in range(2)]
    for row in range(2):
        torch.testing.assert_close(logits[row], expected[row][0, -1], rtol=0, atol=0)


def test_two_threads_on_one_model_do_not_meet():
    from concurrent.futures import ThreadPoolExecutor

    model, ids = tiny_model("Llama"), tiny_ids(90, batch=4)
    table = ragged_table(ModelSpec.from_config(model.config), SINKS + 1, 20)
    steps = [30, *[1] * 60]

    def run(row):
        return stepped_logits(model, ids[row : row + 1], fixed_cache(model, table, 64), steps)

    expected = [run(row) for row in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for row, got in enumerate(pool.map(run, range(4))):
            torch.testing.assert_close(got, expected[row], rtol=0, atol=0)


@pytest.mark.parametrize("filled", [0, 30])
@pytest.mark.parametrize("length", [1, 8])
def test_a_model_that_was_detached_is_noticed_at_once(filled, length):
    model, ids = tiny_model("Llama"), tiny_ids(30)
    cache = kvpolicy.new_cache(model, retention=0.5, min_tokens=8)
    with torch.no_grad():
        if filled:
            model(ids, **over(cache))
        kvpolicy.detach(model)
        with pytest.raises(ModelError, match="not attached"):
            model(ids[:, :length], **over(cache))
        kvpolicy.attach(model)
        model(ids[:, :length], **over(cache))
    assert cache.get_seq_length() == filled + length


def test_keys_that_never_reach_their_attention_are_noticed():
    model, ids = tiny_model("Llama"), tiny_ids(30)
    cache = kvpolicy.new_cache(model, retention=0.5, min_tokens=8)
    key = torch.zeros(1, 2, 30, 16)
    cache.update(key, key, 0)
    with pytest.raises(ModelError, match="no budget was enforced"):
        cache.update(key, key, 1)
    with pytest.raises(ModelError, match="no budget was enforced"):
        cache.report()
    with torch.no_grad(), pytest.raises(ModelError, match="no budget was enforced"):
        model(ids, **over(cache))


def test_offloading_is_refused():
    model = tiny_model("Llama")
    cache = kvpolicy.new_cache(model, retention=0.5)
    cache.offloading = True
    with pytest.raises(ModelError, match="cannot be offloaded"):
        model(tiny_ids(8), **over(cache))


def test_a_users_mask_holds_on_a_compressed_cache():
    model, ids = tiny_model("Llama", attention="eager"), tiny_ids(30)
    table = ragged_table(ModelSpec.from_config(model.config), SINKS + 1, 12)
    hidden = torch.arange(3, 30, 4)

    def logits(mask):
        cache = fixed_cache(model, table, 64)
        with torch.no_grad():
            model(ids[:, :20], **over(cache))
            return model(ids[:, 20:], **over(cache), attention_mask=mask).logits

    causal = torch.arange(30)[None] <= torch.arange(20, 30)[:, None]
    torch.testing.assert_close(logits(causal[None, None]), logits(None), rtol=0, atol=1e-6)
    partly = causal.clone()
    partly[:, hidden[hidden < 20]] = False
    visible = visible_tokens(table, SINKS, [20, 10])
    visible[:, :, 20:, :] &= partly
    expected = masked_logits(model, ids, visible)[:, 20:]
    torch.testing.assert_close(logits(partly[None, None]), expected, rtol=0, atol=1e-5)
    additive = torch.zeros(1, 1, 10, 30).masked_fill(~partly, torch.finfo(torch.float32).min)
    torch.testing.assert_close(logits(additive), expected, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="bias"):
        logits(additive + 0.5)


def test_arguments_that_contradict_each_other_are_refused():
    model = tiny_model("Llama")
    spec = ModelSpec.from_config(model.config)
    plan = BudgetPlan.from_capacities(spec, torch.full(spec.table_shape, 16), 64)
    with pytest.raises(BudgetError, match="a plan and an allocator"):
        kvpolicy.new_cache(model, plan, allocator="uniform")
    with pytest.raises(BudgetError, match="needs retention="):
        kvpolicy.new_cache(model)
    with pytest.raises(BudgetError, match="needs importance"):
        kvpolicy.new_cache(model, allocator="baklava", retention=0.5)
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        kvpolicy.new_cache(model, retention=1.5)
    assert model.config._attn_implementation == "sdpa", "a refused cache leaves the model alone"


@pytest.mark.parametrize("model_class", ["Llama", "Gemma2", "Qwen3Next"])
def test_loss_of_positions_follows_the_tokens_seen(model_class):
    """Positions go on from the tokens seen, never from the entries kept."""
    model = tiny_model(model_class, attention=attention_of(model_class))
    cache = kvpolicy.new_cache(model, retention=0.3, min_tokens=8)
    stepped_logits(model, tiny_ids(60), cache, [40, *[1] * 20])
    assert cache.get_seq_length() == 60
    assert int(cache.lengths.max()) < 60
    kvpolicy.detach(model)
