"""A model over two processes, or over two devices, with a cache that has its budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvpolicy
from kvpolicy import BudgetPlan, ModelSpec
from tests.integrations.parallel_worker import CONTEXT, NEW, PROMPT, RANKS, plan_of, seen_of
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
SHARED = ["Llama", "Qwen3"]  # whose heads are split between the processes; Phi3 keeps them all in each
NAMES = [*SHARED, "Phi3"]


def model_of(name):
    options = {"group": 1} if name == "Phi3" else {"group": 2, "num_kv_heads": 4}
    return tiny_model(name, vocab_size=98, **options)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """For each model what rank 0 and rank 1 saw."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in NAMES:
        model_of(name).save_pretrained(folder / name)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.integrations.parallel_worker"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder), *NAMES],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        output = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(output)
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(RANKS)] for name in NAMES}


@pytest.fixture(scope="module")
def alone():
    """What one process sees: (model, plan) -> of a cache with exactly these capacities."""

    def run(name, capacities):
        model = model_of(name)
        plan = BudgetPlan.from_capacities(ModelSpec.from_config(model.config), capacities, CONTEXT)
        return seen_of(model, kvpolicy.new_cache(model, plan, context_length=CONTEXT))

    return run


@pytest.mark.parametrize("name", SHARED)
def test_each_process_holds_its_heads(name, ranks):
    spec = ModelSpec.from_config(model_of(name).config)
    table = plan_of(spec).capacities(CONTEXT, tp_size=RANKS)
    for rank, found in enumerate(ranks[name]):
        assert found["rank_and_size"] == (rank, RANKS)
        own = table[:, None, 2 * rank : 2 * rank + 2].expand(-1, 2, -1)
        assert torch.equal(found["fixed"]["capacities"], own)
        assert torch.equal(found["fixed"]["lengths"], own), "every budget is used up"
    assert len(table.unique()) > 5 and int(table.max()) < PROMPT + NEW - 1
    totals = [int(found["fixed"]["lengths"].sum()) for found in ranks[name]]
    assert totals[0] == totals[1], "memory is that of the process with the most"
    plain = plan_of(spec).capacities(CONTEXT).unflatten(1, (RANKS, -1)).sum((0, 2))
    assert plain[0] != plain[1], "a table that does not know of the processes would not do this"


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_generate_what_one_does(name, ranks, alone):
    spec = ModelSpec.from_config(model_of(name).config)
    expected = alone(name, plan_of(spec).capacities(CONTEXT, tp_size=RANKS))
    for found in ranks[name]:
        assert torch.equal(found["fixed"]["tokens"], expected["tokens"])
        torch.testing.assert_close(found["fixed"]["logits"], expected["logits"], rtol=0, atol=1e-4)
    full = alone(name, torch.full(spec.table_shape, CONTEXT))
    assert float((full["logits"] - expected["logits"]).abs().max()) > 1e-2, "what is evicted must matter"


@pytest.mark.parametrize("name", SHARED)
def test_a_growing_budget_is_the_same_for_each_process(name, ranks):
    first, second = (found["growing"] for found in ranks[name])
    assert torch.equal(first["tokens"], second["tokens"])
    assert torch.equal(first["lengths"], first["capacities"])
    totals = [found["growing"]["lengths"].sum((0, 2)) for found in ranks[name]]
    assert int((totals[0] - totals[1]).abs().max()) <= 1
    assert not torch.equal(first["capacities"], second["capacities"])


@pytest.mark.parametrize("name", NAMES)
def test_each_process_saves_its_part(name, ranks):
    for found in ranks[name]:
        assert torch.equal(*found["went_on"])
    assert torch.equal(*(found["went_on"][0] for found in ranks[name]))


@pytest.mark.parametrize("name", SHARED)
def test_what_cannot_be_split_is_refused(name, ranks):
    for rank, found in enumerate(ranks[name]):
        other, at_run_time = found["refused"]
        assert f"holds 2 KV heads from head {2 - 2 * rank} on, but this process needs 2 from {2 * rank} on" in other
        assert "AtRunTime splits the budget at run time by comparing all KV heads" in at_run_time


def test_heads_that_every_process_holds_get_the_whole_table(ranks, alone):
    model = model_of("Phi3")
    table = plan_of(ModelSpec.from_config(model.config)).capacities(CONTEXT)
    expected = alone("Phi3", table)
    for found in ranks["Phi3"]:
        assert found["rank_and_size"] == (0, 1)
        assert torch.equal(found["fixed"]["capacities"], table[:, None].expand(-1, 2, -1))
        assert torch.equal(found["fixed"]["lengths"], expected["lengths"])
        assert torch.equal(found["fixed"]["tokens"], expected["tokens"])
        assert found["refused"][0] == "", "both hold the same"
