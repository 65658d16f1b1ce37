"""What goes wrong over a cache at fixed addresses: it is told, and a new prompt makes it good again."""

import contextlib

import pytest
import torch

import kvpolicy
from kvpolicy import BudgetError, ModelError
from tests.tiny import over, tiny_ids, tiny_model

CONTEXT = 80
pytestmark = pytest.mark.filterwarnings("ignore::kvpolicy.GraphWarning")


@pytest.fixture
def model():
    return tiny_model("Llama")


def cache_over(model, *, static=True, **options):
    return kvpolicy.new_cache(model, context_length=CONTEXT, static=static, **{"retention": 0.4, **options})


@pytest.fixture
def runner(model):
    return kvpolicy.DecodeRunner(model, cache_over(model))


@contextlib.contextmanager
def broken_off(module):
    """A forward is interrupted behind this module."""

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = module.register_forward_hook(interrupt)
    try:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            yield
    finally:
        hook.remove()


def test_a_step_broken_off_between_layers(model, runner):
    expected = runner.generate(tiny_ids(50), 4).tolist()
    cache, token = runner.cache, torch.tensor([5])
    runner.prefill(tiny_ids(50))
    with broken_off(model.model.layers[1].mlp):
        runner.step(token)
    with torch.no_grad():
        steps = (lambda: runner.step(token), lambda: model(token[None], **over(cache)))
        for use in (*steps, cache.report, cache.seen_mask):
            with pytest.raises(ModelError, match=r"a step broke off, .*: reset\(\) the cache"):
                use()
    for table in ("lengths", "capacities"):
        with pytest.raises(ModelError, match="a step broke off"):
            getattr(cache, table)
    assert runner.generate(tiny_ids(50), 4).tolist() == expected, "a new prompt makes it good again"


@pytest.mark.parametrize("written", [False, True], ids=["before its first layer", "behind its last layer"])
def test_a_step_broken_off_where_all_layers_agree(model, runner, written):
    """Nothing has been written, or everything: the cache is whole, and the next token gets the right position."""
    ids, plain = tiny_ids(54), cache_over(model, static=False)
    fed = torch.cat([ids[:, :50], ids[:, 50 + (not written) :]], 1)
    with torch.no_grad():
        model(fed[:, :50], **over(plain))
        for column in range(50, fed.shape[1]):
            expected = model(fed[:, column : column + 1], **over(plain)).logits[:, -1]
    runner.prefill(ids[:, :50])
    with broken_off(model.lm_head if written else model.model.layers[0].self_attn.q_proj):
        runner.step(ids[:, 50])
    found = [runner.step(ids[:, column]) for column in (51, 52, 53)][-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert runner.cache.report().seen == plain.report().seen == (fed.shape[1],)
    assert int(runner.cache.get_seq_length()) == fed.shape[1]


def test_a_prompt_that_broke_off(model, runner):
    expected = runner.generate(tiny_ids(50), 4).tolist()
    cache = cache_over(model)
    with broken_off(model.model.layers[1].mlp):
        model(tiny_ids(50), **over(cache))
    with torch.no_grad():
        for use in (lambda: model(tiny_ids(50), **over(cache)), lambda: cache.lengths, cache.report):
            with pytest.raises(ModelError, match=r"broke off.*: reset\(\)"):
                use()
    assert kvpolicy.DecodeRunner(model, cache).generate(tiny_ids(50), 4).tolist() == expected


def test_a_prompt_behind_one_that_did_not_fit(model):
    cache = cache_over(model, retention=1.0)
    with torch.no_grad():
        with pytest.raises(BudgetError, match="a prompt of 90 tokens was given a static store for 80"):
            model(tiny_ids(90), **over(cache))
        with pytest.raises(ModelError, match=r"broke off.*: reset\(\)"):
            model(tiny_ids(60), **over(cache))
        cache.reset()
        model(tiny_ids(60), **over(cache))
    assert cache.report().seen == (60,)


def test_nothing_is_overwritten_where_everything_is_to_be_kept(model):
    """Without the runner, which counts itself: a forward of one token, and generate."""
    cache = cache_over(model, retention=1.0)
    with torch.no_grad():
        model(tiny_ids(CONTEXT - 2), **over(cache))
        for _ in range(2):
            model(tiny_ids(1), **over(cache))
        with pytest.raises(BudgetError, match=r"everything is kept .* room for 80 tokens"):
            model(tiny_ids(1), **over(cache))
    assert not cache.report().evicted
    assert cache.report().seen == (CONTEXT,)
    cache.reset()
    with pytest.raises(BudgetError, match="everything is kept"):
        model.generate(tiny_ids(CONTEXT - 2), **over(cache), max_new_tokens=9, do_sample=False, eos_token_id=None)


def test_a_model_that_was_detached(model):
    cache = cache_over(model)
    with torch.no_grad():
        model(tiny_ids(50), **over(cache))
        kvpolicy.detach(model)
        with pytest.raises(ModelError, match=r"not attached \(any more\)"):
            model(tiny_ids(1), **over(cache))
        kvpolicy.attach(model)
        model(tiny_ids(1), **over(cache))
    assert cache.report().seen == (51,)


def test_nothing_of_the_prompt_before_is_left_by_a_reset(model):
    """`kvpolicy.generate` asks what was seen: positions would begin behind the prompt before."""
    cache, positions = cache_over(model), []
    kvpolicy.generate(model, cache, tiny_ids(60), max_new_tokens=5, do_sample=False)
    cache.reset()
    assert cache.seen_mask().shape == (1, 0)
    hook = model.model.register_forward_pre_hook(
        lambda _, given, named: positions.append(named["position_ids"].tolist()), with_kwargs=True
    )
    kvpolicy.generate(model, cache, tiny_ids(50), max_new_tokens=2, do_sample=False)
    hook.remove()
    assert positions == [[list(range(50))], [[50]]]
    cache.reset()
    for what in (cache.report, lambda: cache.lengths):
        with pytest.raises(ModelError, match="this cache is empty: a prompt comes first"):
            what()


def test_one_row_for_a_batch_of_two(model):
    cache = cache_over(model)
    with torch.no_grad():
        model(tiny_ids(50, batch=2), **over(cache))
        with pytest.raises(BudgetError, match=r"2 sequences of 2 KV heads .* \(1, 2, 1, 16\)"):
            model(tiny_ids(1), **over(cache))
        model(tiny_ids(1, batch=2), **over(cache))
    assert cache.report().seen == (51, 51), "the refused token has not been counted"


def test_a_prompt_that_came_from_elsewhere(model, runner):
    other = kvpolicy.DecodeRunner(model, runner.cache)
    runner.prefill(tiny_ids(50))
    other.prefill(tiny_ids(20))
    with pytest.raises(ModelError, match="did not come from this runner: prefill\\(\\) first"):
        runner.step(torch.tensor([5]))
    other.step(torch.tensor([5]))
    assert runner.cache.report().seen == (21,)


@pytest.mark.parametrize("of", [{"layers": 2}, {"layers": 4}, {"num_kv_heads": 4}], ids=str)
def test_a_cache_of_another_model(model, of):
    with pytest.raises(ModelError, match="made for a model of other layers or heads"):
        kvpolicy.DecodeRunner(tiny_model("Llama", **of), cache_over(model))


WRONG = {
    r"int64 \[sequences, tokens\], .* got torch.int64 \[50\]": (tiny_ids(50)[0], None),
    r"int64 \[sequences, tokens\], .* got torch.int64 \[1, 0\]": (tiny_ids(50)[:, :0], None),
    r"the prompt's shape, \[1, 50\], got \[1, 51\]": (tiny_ids(50), torch.ones(1, 51)),
    "padding on the left alone": (tiny_ids(50), (torch.arange(50) < 40)[None].long()),
    "padding on the left alone.*": (tiny_ids(50), (torch.arange(50) != 20)[None].long()),
}


@pytest.mark.parametrize(("message", "given"), WRONG.items(), ids=WRONG)
def test_prompts_that_the_runner_cannot_take(runner, message, given):
    with pytest.raises(ModelError, match=message):
        runner.prefill(*given)
    assert runner.generate(tiny_ids(50), 3).shape == (1, 53), "the memory was not made for the wrong one"


def test_several_tokens_that_end_a_row(runner):
    ids = tiny_ids(50, batch=2)
    free = runner.generate(ids, 12)
    ends = [int(free[0, 53]), int(free[1, 57])]
    first = [next(i for i in range(50, 62) if int(row[i]) in ends) for row in free]
    found = runner.generate(ids, 12, eos_token_id=ends)
    assert found.shape[1] == max(first) + 1
    for row, whole, end in zip(found, free, first, strict=True):
        assert row[: end + 1].tolist() == whole[: end + 1].tolist()
        assert set(row[end + 1 :].tolist()) <= {ends[0]}
