"""Plans whose layers share: what their files say, and what runs them or refuses."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kvpolicy_kernels.formats import INT8

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, ModelSpec, PlanError, PluginError, PromptProbe, RaggedStore
from kvpolicy.budget.plan import load_plan, save_plan
from kvpolicy.comparison.decoding import DecodingTask
from kvpolicy.comparison.methods import check_asked, read_asked
from kvpolicy.comparison.task import PerplexityTask
from kvpolicy.integrations.transformers import TransformersProbe, load_config, prompt_cache
from kvpolicy.measure.evaluation import measured_bytes
from kvpolicy.plugins.registry import registry
from tests.integrations.ragged_oracle import ragged_table, stepped_logits
from tests.tiny import over, tiny_ids, tiny_model

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


@pytest.mark.parametrize("entry_format", [None, INT8])
def test_one_forward_is_decoding_token_by_token(model, entry_format):
    model = copy.deepcopy(model).double()  # else a last bit of a key changes its code
    spec, ids = ModelSpec.from_config(model.config).sharing(SHARED), tiny_ids(70)
    table = ragged_table(spec, 10, 40)
    probe = TransformersProbe(model, ids, entry_format=entry_format, shared_layers=SHARED)
    (losses,) = probe.token_losses(table)
    plan = BudgetPlan.from_capacities(spec, table, context_length=70)
    options = {"retention": plan.retentions[0], "context_length": 70, "format": entry_format, "shared_layers": SHARED}
    logits = stepped_logits(model, ids, kvpolicy.new_cache(model, plan, **options), [1] * 70)
    expected = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")[probe.first_scored - 1 :]
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-5)
    memory = measured_bytes(probe, table)
    assert memory.entries == int(table.sum()) and memory.dense_bytes == 70 * 4 * 2 * 32 * 8
    with pytest.raises(PluginError, match=r"soft_loss .*\[2, 3\] have none \(shared_layers\)"):
        probe.soft_loss(lambda layer, ranks: ranks.float())


def test_behind_a_prompt_the_loss_is_that_of_a_cache(model):
    spec, ids = ModelSpec.from_config(model.config).sharing(SHARED), tiny_ids(70)
    policy, table = registry.create("policy", "snapkv"), ragged_table(spec, 10, 40)
    probe = PromptProbe(model, ids, policy=policy, prefill_length=50, shared_layers=SHARED)
    with torch.no_grad(), kvpolicy.attached(model):
        cache = prompt_cache(model, policy, table, shared_layers=SHARED)
        logits = [model(part, **over(cache)).logits for part in ids.split([50, *[1] * 19, 1], 1)[:-1]]
    expected = F.cross_entropy(torch.cat(logits, 1)[0, 49:], ids[0, 50:])
    torch.testing.assert_close(probe.loss(table), expected[None].double(), rtol=0, atol=1e-5)
    assert measured_bytes(probe, table).entries == int(table.sum())


def test_it_is_compared_at_equal_bytes(model, plan, tmp_path):
    """With others, whose retention is one of all layers: half as many keep twice as much."""
    spec, ids = ModelSpec.from_config(model.config), tiny_ids(200, batch=2)
    save_plan(plan.sharing(spec, SHARED), path := tmp_path / "plan.json")
    methods = read_asked(["streaming", str(path)])
    check_asked(methods, [0.3], None)
    for task in (DecodingTask(model, ids), PerplexityTask(model, ids, prefill_length=150)):
        sizes = []
        for method in methods:
            table = partial(method.table, spec, retention=0.3, seed=0, dtype=torch.float32)
            measured = task.measure(method, lambda context, of=table: of(context=context))
            sizes.append(measured.memory)
        assert sizes[0].dense_bytes == sizes[1].dense_bytes and sizes[0].entries == sizes[1].entries
        assert sizes[1].bytes == pytest.approx(sizes[0].bytes, rel=0.01)
    assert methods[1].reaches(0.3) and not methods[1].reaches(0.5 * plan.retentions[0] - 0.01)
    assert task.decode_ms(methods[1], table(context=150)) > 0


def test_commands_run_it(tiny_checkpoint, tiny_text, tmp_path, request):
    run = request.getfixturevalue("kvpolicy")
    model, spec = ["--model", tiny_checkpoint], ModelSpec.from_config(load_config(str(tiny_checkpoint)))
    path = tmp_path / "plan.json"
    save_plan(BudgetPlan.from_capacities(spec, [[30, 20], [20, 30]], 64).sharing(spec, {1: 0}), path)
    assert run("validate", path, *model).code == 0
    said = run("generate", path, *model, "--prompt", "a word", "--max-new-tokens", 3, "--json").json
    assert said["bytes"] > 0
    common, without = [*model, "--dtype", "float32", "--context", 64, "--json"], tmp_path / "without.json"
    save_plan(BudgetPlan.from_capacities(spec, [[30, 20], [20, 30]], 64), without)
    text = [*common, "--text", tiny_text, "--limit", 2]
    shared, own = (run("eval", each, *text).json for each in (path, without))
    assert shared["full"] == own["full"] and shared["dense_bytes"] == own["dense_bytes"]
    assert shared["entries"] == shared["uniform"]["entries"] == own["entries"] // 2
    assert shared["uniform"]["perplexity"] != own["uniform"]["perplexity"]
    questions = tmp_path / "mine.jsonl"
    row = {"context": "ba de fi " * 7, "question": "ku?", "answers": ["ba"]}
    questions.write_text("\n".join([json.dumps(row)] * 2))
    said = run("eval", path, *common, "--task-file", questions, "--limit", 2).json
    assert said["entries"] == said["uniform"]["entries"] == pytest.approx(said["full"]["entries"] * 25 / 64 / 2, abs=4)
    assert said["dense_bytes"] == said["full"]["dense_bytes"]
