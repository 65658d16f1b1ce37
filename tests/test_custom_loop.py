"""docs/examples/custom_loop.py: a decoder written by hand over a `RaggedStore`, against transformers."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import kvpolicy
from tests.tiny import over, tiny_ids, tiny_model

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "custom_loop.py"
PROMPT, COUNT = 90, 40


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("custom_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return tiny_model("Llama", layers=3, num_kv_heads=2, group=3)


@pytest.fixture(scope="module")
def model(example, reference):
    return example.Llama.from_state_dict(reference.config, reference.state_dict())


def ragged_plan(model):
    """Each KV head has another capacity of 100 tokens: 10 to 60."""
    spec = kvpolicy.ModelSpec.from_config(model.config)
    return kvpolicy.BudgetPlan.from_capacities(spec, torch.tensor([[10, 60], [20, 50], [30, 40]]), context_length=100)


def test_a_full_budget_gives_the_logits_of_transformers(reference, model):
    ids = tiny_ids(PROMPT + 8, batch=2)
    store = kvpolicy.RaggedStore.from_plan(ragged_plan(reference), retention=1.0, batch_size=2)
    with torch.no_grad():
        expected = reference(ids).logits
        logits = [model(ids[:, :PROMPT], store, 0)]
        logits += [model(ids[:, t : t + 1], store, t) for t in range(PROMPT, PROMPT + 8)]
    torch.testing.assert_close(torch.stack(logits, 1), expected[:, PROMPT - 1 :], rtol=0, atol=1e-4)
    assert store.lengths.eq(PROMPT + 8).all()


@pytest.mark.parametrize(
    "options",
    [{"retention": 0.35, "min_tokens": 8}, {"context_length": 100}, {"retention": 0.35}],
    ids=["growing", "fixed", "kept whole at first"],
)
def test_a_ragged_table_gives_the_tokens_of_new_cache(example, reference, model, options):
    plan, ids = ragged_plan(reference), tiny_ids(PROMPT, batch=2)
    cache = kvpolicy.new_cache(reference, plan, **options)
    expected = reference.generate(
        ids, **over(cache), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, eos_token_id=None
    )
    store = kvpolicy.RaggedStore.from_plan(plan, **options, batch_size=2)
    assert torch.equal(example.generate(model, store, ids, COUNT), expected[:, PROMPT:])
    assert torch.equal(store.lengths, cache.lengths)
    assert torch.equal(store.capacities, cache.capacities)
    if "min_tokens" in options or "context_length" in options:
        assert len(store.lengths.unique()) > 4, "the table is ragged"


def test_what_is_kept_matters(example, reference, model):
    """Else the test above could not fail."""
    ids = tiny_ids(PROMPT, batch=2)
    ragged, full = (
        example.generate(model, kvpolicy.RaggedStore.from_plan(ragged_plan(reference), **options), ids, COUNT)
        for options in ({"context_length": 100, "batch_size": 2}, {"retention": 1.0, "batch_size": 2})
    )
    assert not torch.equal(ragged, full)


@pytest.mark.parametrize("chunk", [1, 2, 7, 90])
def test_a_padded_prompt_in_chunks_gives_what_its_rows_give_alone(example, reference, model, chunk):
    """Also where a chunk is one token of one row and padding of another."""
    lengths, ids = (PROMPT, PROMPT - 1, PROMPT - 6), tiny_ids(PROMPT, batch=3)
    padding = torch.tensor([PROMPT - length for length in lengths])
    store = kvpolicy.RaggedStore.from_plan(ragged_plan(reference), context_length=100, batch_size=3)
    got = example.generate(model, store, ids, 12, padding, chunk)
    assert store.seen.tolist() == [length + 11 for length in lengths]
    for row, length in enumerate(lengths):
        alone = kvpolicy.RaggedStore.from_plan(ragged_plan(reference), context_length=100)
        first, column = PROMPT - length, 0
        pieces = [ids[row, max(first, c) : max(first, c + chunk)] for c in range(0, PROMPT, chunk)]
        with torch.no_grad():
            for piece in filter(len, pieces):
                logits, column = model(piece[None], alone, column), column + len(piece)
            tokens = [logits.argmax(-1, keepdim=True)]
            for position in range(column, column + 11):
                tokens.append(model(tokens[-1], alone, position).argmax(-1, keepdim=True))
        assert torch.equal(got[row], torch.cat(tokens, 1)[0])
        assert torch.equal(store.lengths[:, row], alone.lengths[:, 0])
        assert [x.sort().values.tolist() for x in store.positions(0)[2 * row : 2 * row + 2]] == [
            x.sort().values.tolist() for x in alone.positions(0)
        ]


def test_a_head_tied_to_the_embedding_may_be_missing(example, reference):
    weights = reference.state_dict()
    del weights["lm_head.weight"]
    tied = example.Llama.from_state_dict(reference.config, weights)
    assert tied.lm_head.weight.equal(reference.model.embed_tokens.weight)


def test_it_is_as_short_as_the_page_says():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_it_runs_as_a_script(monkeypatch, capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("".join(f"{n} squared is {n * n}. " for n in range(1, 60)) + "60 squared is", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["custom_loop.py", str(prompt)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    held, full = map(float, re.search(r"([\d.]+) of ([\d.]+) MB held", said).groups())
    assert said.startswith(" 3600.") and held < 0.4 * full
