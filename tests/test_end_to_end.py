"""The main job on a real model, as from a shell: SmolLM2-135M on Python's language reference."""

import json
import math
import subprocess
import sys

import pytest

from kvpolicy import ModelSpec, load_plan

pytestmark = pytest.mark.slow

CONTEXT = 256
KVPOLICY = [sys.executable, "-c", "from kvpolicy.cli import main; main()"]


def kvpolicy(*arguments):
    command = [*KVPOLICY, *map(str, arguments), "--context", str(CONTEXT), "--dtype", "float32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plan_file(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    kvpolicy("tune", "--retention", "0.3", "--retention", "0.1", "--trials", "3", "--out", path)
    return path


@pytest.fixture(scope="module")
def evaluated(plan_file):
    """Rows of eval at 10 %, by name."""
    names = {"plan": plan_file, "uniform": "uniform", "full": "full"}
    kept = ["--retention", "0.1"]
    return {key: kvpolicy("eval", name, *([] if key == "full" else kept)) for key, name in names.items()}


def test_tune_writes_shares_for_every_kv_head(plan_file, smollm2):
    plan = load_plan(plan_file)
    plan.check_model(ModelSpec.from_config(smollm2[0].config))
    assert plan.retentions == (0.1, 0.3)
    assert [tuple(level.shares.shape) for level in plan.levels] == [(30, 3), (30, 3)]
    assert tuple(plan.importance.per_head.shape) == (30, 3)
    assert float(plan.importance.per_head.std()) > 0.01


@pytest.mark.parametrize("retention", [0.1, 0.2, 0.3, 0.65])
@pytest.mark.parametrize("context", [CONTEXT, 1000, 1023])
def test_capacities_sum_exactly_at_and_between_the_levels(plan_file, retention, context):
    table = load_plan(plan_file).capacities(context, retention=retention)
    assert int(table.sum()) == round(retention * context * 90)
    assert int(table.min()) >= 5
    assert int(table.max()) <= context


def test_perplexity_is_finite_and_full_is_better_than_uniform(evaluated):
    perplexity = {name: row["perplexity"] for name, row in evaluated.items()}
    assert all(math.isfinite(value) and value > 1 for value in perplexity.values())
    assert perplexity["full"] < perplexity["uniform"]
    assert perplexity["full"] < perplexity["plan"]
    assert perplexity["plan"] < 1.5 * perplexity["uniform"]


def test_the_bytes_at_10_percent_are_about_a_tenth(evaluated):
    dense = CONTEXT * 90 * 2 * 64 * 4
    assert {row["dense_bytes"] for row in evaluated.values()} == {dense}
    assert evaluated["plan"]["entries"] == evaluated["uniform"]["entries"] == round(0.1 * CONTEXT * 90)
    assert 0.1 * dense <= evaluated["plan"]["bytes"] < 0.102 * dense
    assert evaluated["full"]["bytes"] >= dense


def test_eval_measures_what_tune_reported(evaluated, plan_file):
    level = next(level for level in load_plan(plan_file).levels if level.retention == 0.1)
    for name, key in (("plan", "heldout"), ("uniform", "heldout_uniform"), ("full", "heldout_full")):
        assert evaluated[name]["perplexity"] == pytest.approx(level.perplexity[key], rel=1e-5)
