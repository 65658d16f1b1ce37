"""A decoded token that does not come to its end, as a replay or without one: it is told, and a prompt makes it good."""

import pytest
import torch

import kvpolicy
from kvpolicy import BudgetError, ModelError
from tests.integrations.recording import record_on_cpu
from tests.tiny import over, tiny_ids, tiny_model


@pytest.fixture
def model():
    return tiny_model("Llama")


def cache_over(model, **options):
    return kvpolicy.new_cache(model, **{"retention": 0.4, "context_length": 80, **options})


@pytest.fixture(params=["graph", "eager"])
def runner(request, model, monkeypatch):
    if request.param == "graph":
        record_on_cpu(monkeypatch)
    runner = kvpolicy.DecodeRunner(model, cache_over(model))
    runner.prefill(tiny_ids(50))
    for token in (5, 6, 7):
        runner.step(torch.tensor([token]))
    assert runner.mode == request.param
    return runner


def broken_off(monkeypatch, module, work):
    """Runs work that is interrupted behind this module. No hook, since a graph is not made where there is one."""
    forward = module.forward

    def interrupt(*args, **kwargs):
        forward(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, torch.no_grad(), pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "forward", interrupt)
        work()


def test_a_step_broken_off_between_layers(model, runner, monkeypatch):
    cache, token = runner.cache, torch.tensor([5])
    broken_off(monkeypatch, model.model.layers[1].mlp, lambda: runner.step(token))
    with torch.no_grad():
        steps = (lambda: runner.step(token), lambda: model(token[None], **over(cache)))
        for use in (*steps, cache.report, cache.fork):
            with pytest.raises(ModelError, match=r"broke off.* reset\(\) it"):
                use()
    for table in ("lengths", "capacities", "nbytes"):
        with pytest.raises(ModelError, match="broke off"):
            getattr(cache, table)
    found = runner.generate(tiny_ids(50), 4)
    expected = kvpolicy.DecodeRunner(model, cache_over(model)).generate(tiny_ids(50), 4)
    assert found.tolist() == expected.tolist(), "a new prompt makes it good again"


def test_the_first_token_of_a_cache_that_broke_off(model, monkeypatch):
    """It is planned, and runs by itself: the second one is recorded."""
    record_on_cpu(monkeypatch)
    runner = kvpolicy.DecodeRunner(model, cache_over(model))
    runner.prefill(tiny_ids(50))
    broken_off(monkeypatch, model.model.layers[1].mlp, lambda: runner.step(torch.tensor([5])))
    with pytest.raises(ModelError, match=r"a forward broke off with KeyboardInterrupt.* reset\(\) it"):
        runner.step(torch.tensor([5]))


def test_a_recording_that_broke_off(model, monkeypatch):
    """The device has done nothing of it yet, so the cache is what it was."""
    recorded = record_on_cpu(monkeypatch)
    runner = kvpolicy.DecodeRunner(model, cache_over(model, retention=1.0))
    runner.prefill(tiny_ids(50))
    runner.step(torch.tensor([5]))
    broken_off(monkeypatch, model.model.layers[1].mlp, lambda: runner.step(torch.tensor([6])))
    assert not recorded
    assert runner.cache.report().seen == (51,)
    found = [runner.step(torch.tensor([token])) for token in (6, 7, 8)]
    assert runner.mode == "graph"
    ids = torch.cat([tiny_ids(50), torch.tensor([[5, 6, 7, 8]])], 1)
    torch.testing.assert_close(torch.cat(found), model(ids).logits[0, -3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("written", [False, True], ids=["before its first layer", "behind its last layer"])
def test_a_step_without_a_graph_broken_off_where_all_layers_agree(model, monkeypatch, written):
    """Nothing has been written, or everything: the cache is whole, and the next token gets the right position."""
    ids, plain, runner = tiny_ids(54), cache_over(model), kvpolicy.DecodeRunner(model, cache_over(model))
    fed = torch.cat([ids[:, :50], ids[:, 50 + (not written) :]], 1)
    with torch.no_grad():
        model(fed[:, :50], **over(plain))
        for column in range(50, fed.shape[1]):
            expected = model(fed[:, column : column + 1], **over(plain)).logits[:, -1]
    runner.prefill(ids[:, :50])
    module = model.lm_head if written else model.model.layers[0].self_attn.q_proj
    broken_off(monkeypatch, module, lambda: runner.step(ids[:, 50]))
    found = [runner.step(ids[:, column]) for column in (51, 52, 53)][-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert runner.cache.report().seen == plain.report().seen == (fed.shape[1],)
    assert int(runner.cache.get_seq_length()) == fed.shape[1]


def test_a_prompt_that_broke_off(model, monkeypatch):
    cache = cache_over(model)
    broken_off(monkeypatch, model.model.layers[1].mlp, lambda: model(tiny_ids(50), **over(cache)))
    with torch.no_grad():
        for use in (lambda: model(tiny_ids(50), **over(cache)), lambda: cache.lengths, cache.report):
            with pytest.raises(ModelError, match=r"broke off.*: reset\(\)"):
                use()
    found = kvpolicy.DecodeRunner(model, cache).generate(tiny_ids(50), 4)
    assert found.tolist() == kvpolicy.DecodeRunner(model, cache_over(model)).generate(tiny_ids(50), 4).tolist()


def test_a_model_that_was_detached(model, runner):
    cache = runner.cache
    with torch.no_grad():
        kvpolicy.detach(model)
        with pytest.raises(ModelError, match=r"not attached \(any more\)"):
            model(tiny_ids(1), **over(cache))
        kvpolicy.attach(model)
        model(tiny_ids(1), **over(cache))
    assert cache.report().seen == (54,)


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


def test_one_row_for_a_batch_of_two(model, monkeypatch):
    record_on_cpu(monkeypatch)
    cache = cache_over(model)
    with torch.no_grad():
        model(tiny_ids(50, batch=2), **over(cache))
        for _ in range(3):
            model(tiny_ids(1, batch=2), **over(cache))
        with pytest.raises(BudgetError, match=r"2 sequences of 2 KV heads: .* got \(1, 2, 1, 16\)"):
            model(tiny_ids(1), **over(cache))
    assert cache.store.seen.tolist() == [53, 53], "the refused token has not been counted"
