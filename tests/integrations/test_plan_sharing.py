"""Plans whose layers share: what their files say, and what runs them or refuses."""

import json

import pytest
import torch

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, ModelSpec, PlanError, RaggedStore
from kvpolicy.budget.plan import load_plan, save_plan
from kvpolicy.integrations.transformers import load_config
from tests.integrations.ragged_oracle import ragged_table, stepped_logits
from tests.tiny import tiny_ids, tiny_model

SHARED = {2: 0, 3: 2}


@pytest.fixture(scope="module")
def model():
    model = tiny_model("Llama", layers=4)
    yield model
    kvpolicy.detach(model)


@pytest.fixture
def plan(model):
    spec = ModelSpec.from_config(model.config)
    return BudgetPlan.from_capacities(spec, ragged_table(spec, 10, 40), 64)


def test_budgets_of_the_layers_that_are_left_keep_their_proportions(model, plan):
    shared = plan.sharing(ModelSpec.from_config(model.config), SHARED)
    assert shared.shared_layers == SHARED and shared.model.budgeted_layers == (0, 1)
    assert shared.retentions == plan.retentions
    rows = plan.levels[0].shares[:2]
    torch.testing.assert_close(shared.levels[0].shares, rows * float(plan.retentions[0] / rows.mean()))


def test_a_file_says_it_in_version_2(model, plan, tmp_path):
    path, spec = tmp_path / "plan.json", ModelSpec.from_config(model.config)
    save_plan(plan, path)
    document = json.loads(path.read_text())
    assert document["version"] == 1 and "shared_layers" not in document["model"]
    save_plan(plan.sharing(spec, SHARED), path)
    document = json.loads(path.read_text())
    assert document["version"] == 2 and document["model"]["shared_layers"] == [[2, 0], [3, 2]]
    assert load_plan(path).shared_layers == SHARED
    for change, message in (
        ({"version": 1}, "version is 1, expected 2: layers share entries"),
        (
            {"model": document["model"] | {"shared_layers": [[1, 0]]}},
            r"shared_layers\[0\] is \[1, 0\], expected a layer",
        ),
        ({"model": document["model"] | {"shared_layers": [[2, 3]]}}, r"shared_layers\[0\] is \[2, 3\]"),
        ({"model": document["model"] | {"shared_layers": [[2]]}}, r"model.shared_layers\[0\]"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(PlanError, match=message):
            load_plan(path)


def test_caches_under_the_plan_share(model, plan, tmp_path):
    spec, ids = ModelSpec.from_config(model.config), tiny_ids(60)
    shared, options = plan.sharing(spec, SHARED), {"context_length": 64}
    cache = kvpolicy.new_cache(model, shared, **options)
    told = kvpolicy.new_cache(model, policy="streaming", retention=1.0, shared_layers=SHARED)
    logits = stepped_logits(model, ids, cache, [40, 8] + [1] * 12)
    assert torch.equal(cache.lengths[:, 0], shared.capacities(context_length=64).clamp(max=60))
    assert not torch.equal(logits, stepped_logits(model, ids, told, [40, 8] + [1] * 12))
    cache.save(tmp_path / "cache")
    assert kvpolicy.load_cache(model, tmp_path / "cache", shared).recipe.shared_layers == SHARED
    with kvpolicy.attached(model, plan=shared, **options):
        out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 63)
    assert len(RaggedStore.from_plan(shared, spec=spec, **options).layers) == 2
    with pytest.raises(BudgetError, match=r"shared_layers= was given, and the plan has its own, \{2: 0, 3: 2\}"):
        kvpolicy.new_cache(model, shared, shared_layers={1: 0}, **options)


def test_who_cannot_run_it_refuses(plan, model):
    spec = ModelSpec.from_config(model.config)
    shared = plan.sharing(spec, SHARED)
    with pytest.raises(
        PlanError, match=r"the plan has layers \[2, 3\] keep no entries \(shared_layers\), which is not"
    ):
        shared.check_model(spec)
    with pytest.raises(PlanError, match="made for another model"):
        shared.check_model(ModelSpec.from_config(tiny_model("Llama", layers=3).config))
    with pytest.raises(PlanError, match="keep no entries"):
        shared.sharing(spec, {1: 0})


def test_commands_run_it_or_refuse(tiny_checkpoint, tiny_text, tmp_path, request):
    run, refused = (request.getfixturevalue(name) for name in ("kvpolicy", "refused"))
    model, spec = ["--model", tiny_checkpoint], ModelSpec.from_config(load_config(str(tiny_checkpoint)))
    path = tmp_path / "plan.json"
    save_plan(BudgetPlan.from_capacities(spec, [[30, 20], [20, 30]], 64).sharing(spec, {1: 0}), path)
    assert run("validate", path, *model).code == 0
    said = run("generate", path, *model, "--prompt", "a word", "--max-new-tokens", 3, "--json").json
    assert said["bytes"] > 0
    assert "shared_layers" in refused("eval", path, *model, "--text", tiny_text, "--context", 64)
