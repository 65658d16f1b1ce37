"""Plans whose layers have formats: the file, and every way to run it."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kvpolicy_kernels.formats import INT4, INT8
from transformers import AutoConfig

import kvpolicy as package
from kvpolicy import Budget, BudgetError, BudgetPlan, ModelSpec, PlanError, PlanWarning, load_plan, save_plan
from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import LayerFormats, name_of
from kvpolicy.budget.plan import PlanLevel
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.arena import LayerArena
from kvpolicy.cache.encoded_arena import EncodedArena
from kvpolicy.cache.size import entry_costs, entry_nbytes
from kvpolicy.cache.state import pack
from kvpolicy.cache.weight import plan_retention
from kvpolicy.comparison.methods import read_asked, read_methods
from kvpolicy.integrations.transformers import TransformersProbe, attached, prompt_cache
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.integrations.transformers.attention.key_centre import key_centres
from kvpolicy.measure.evaluation import measured_bytes
from kvpolicy.report.numbers import level_bytes
from kvpolicy.report.tables import level_rows
from tests.integrations.ragged_oracle import MaskedAttention, ragged_table, stepped_logits, visible_tokens
from tests.integrations.saving import assert_same
from tests.integrations.test_entry_formats import SINKS, STEPS, CodedAttention, exact_tokens
from tests.tiny import over, tiny_ids, tiny_model
from tests.tiny_checkpoint import save_tiny_checkpoint

MIXED = ("int4", "model", "int8")
FORMATS = LayerFormats((INT4, None, INT8))


@pytest.fixture(scope="module")
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_model("Llama")
    torch.set_num_threads(before)


def plan_of(spec, *levels, context=110):
    """A plan of levels (table, formats)."""
    plans = [BudgetPlan.from_capacities(spec, table, context_length=context) for table, _ in levels]
    own = [replace(p.levels[0], formats=formats) for p, (_, formats) in zip(plans, levels, strict=True)]
    return replace(plans[0], levels=tuple(own))


@pytest.fixture(scope="module")
def mixed(model):
    spec = ModelSpec.from_config(model.config)
    return plan_of(spec, (ragged_table(spec, 40, 60), MIXED))


def test_a_plan_with_formats_is_of_version_2_and_comes_back(mixed, tmp_path):
    save_plan(mixed, tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["version"] == 2 and document["levels"][0]["formats"] == list(MIXED)
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.sha256 == mixed.sha256 and loaded.levels[0].entry_format == FORMATS
    assert name_of(FORMATS) == "int4 in 1, model in 1, int8 in 1"


def test_a_plan_without_formats_is_the_file_it_was(mixed):
    for formats in (None, ("model",) * 3):
        plan = replace(mixed, levels=(replace(mixed.levels[0], formats=formats),))
        document = plan.to_json()
        assert document["version"] == 1 and plan.levels[0].formats is None
        assert list(document["levels"][0]) == [
            *("retention", "shares", "allocator_params", "perplexity", "comparison", "retrieval")
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ["int4"]}, r"levels\[0\]\.formats has 1 items, expected 3"),
        ({"formats": "int4"}, r"levels\[0\]\.formats is 'int4', expected a list"),
        ({"formats": ["int4", 8, "int4"]}, r"levels\[0\]\.formats\[1\] is 8, expected a text"),
        (
            {"formats": ["int4", "int3", "int4"]},
            r"levels\[0\]\.formats\[1\] is 'int3', expected one of model, int8",
        ),
        ({"formats": None}, "version is 2, expected 1: no level has formats"),
        ({"version": 1}, "version is 1, expected 2: a level has formats"),
        ({"version": 3}, "version is 3, expected 1 or 2"),
    ],
)
def test_a_bad_file_is_refused(mixed, change, message):
    document = json.loads(json.dumps(mixed.to_json()))
    (document if "version" in change else document["levels"][0]).update(change)
    with pytest.raises(PlanError, match=message):
        BudgetPlan.from_json(document)
    level = mixed.levels[0]
    with pytest.raises(PlanError, match="formats has 2 items, expected one for each of 3 budgeted layers"):
        replace(mixed, levels=(PlanLevel(level.retention, level.shares, formats=("int4", "int8")),))
    with pytest.raises(PlanError, match=r"levels\[0\]\.formats: .*head dim 24 has no format"):
        replace(mixed, model=replace(mixed.model, head_dim=24))


def test_reports_count_the_bytes_of_the_formats(mixed):
    """Of 16 channels: 8 bytes of codes and 4 of scales, 32 bytes, 16 and 4."""
    shares = mixed.levels[0].shares.sum(1).tolist()
    expected = sum(2 * size * share for size, share in zip((12, 32, 20), shares, strict=True))
    assert level_bytes(mixed, mixed.levels[0]) == pytest.approx(expected)
    (row,) = level_rows(mixed)
    assert row["format"] == name_of(FORMATS)


def test_the_format_is_that_of_the_level_in_use(model):
    spec = ModelSpec.from_config(model.config)
    plan = plan_of(spec, (ragged_table(spec, 40, 60), MIXED), (torch.full(spec.table_shape, 80), None))
    low, high = plan.retentions
    for ask, expected in [
        (Ask(low), FORMATS),
        (Ask((low + high) / 2), FORMATS),
        (Ask(high), None),
        (Ask(1.0), None),
        (Ask(tokens=55, context_length=110), FORMATS),
        (Ask(tokens=20, context_length=110), FORMATS),
        (Ask(tokens=100), None),
    ]:
        assert plan.entry_format(ask) == expected
    assert plan.capacities(110, tokens=55).min() >= SINKS + 32
    with pytest.warns(PlanWarning, match="below the plan's lowest level"):
        least = plan.capacities(110, tokens=36).min()
    assert least == SINKS + 32, "what stays exact is inside every capacity"


@torch.no_grad()
def test_a_cache_equals_a_dense_forward_over_what_each_layer_keeps(model):
    model = copy.deepcopy(model).double()  # else a last bit of a key changes its code
    spec, total = ModelSpec.from_config(model.config), sum(STEPS)
    ids, table = tiny_ids(total), ragged_table(spec, 36, 60)
    plan = plan_of(spec, (table, MIXED), context=total)
    cache = package.new_cache(model, plan, context_length=total)
    found = stepped_logits(model, ids, cache, list(STEPS))
    visible, handlers, centres = visible_tokens(table, SINKS, STEPS), {}, key_centres(model, spec)
    for row, (module, _) in enumerate(attention_modules(model, list(spec.budgeted_layers))):
        own = FORMATS.layers[row]
        coded = own and CodedAttention(visible[row], exact_tokens(own, STEPS), own, centres[row])
        handlers[module] = coded or MaskedAttention(visible[row])
    with intercepted(model, handlers):
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(cache.lengths[:, 0], table)
    assert cache.report().entry_format == name_of(FORMATS)


def test_one_forward_is_decoding_token_by_token(model, mixed):
    model = copy.deepcopy(model).double()
    ids, table = tiny_ids(110), mixed.capacities(110)
    probe = TransformersProbe(model, ids, entry_format=FORMATS)
    (losses,) = probe.token_losses(table)
    logits = stepped_logits(model, ids, package.new_cache(model, mixed, context_length=110), [1] * 110)
    expected = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")[probe.first_scored - 1 :]
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-5)
    assert measured_bytes(probe, table).bytes == probe.filled(table).nbytes


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
@pytest.mark.filterwarnings("ignore::kvpolicy.PlanWarning")
def test_a_saved_cache_goes_on_as_it_was(model, mixed, policy, tmp_path):
    ids, cache = tiny_ids(140), package.new_cache(model, mixed, min_tokens=8, policy=policy)
    stepped_logits(model, ids[:, :90], cache, [70, *[1] * 20])
    cache.save(tmp_path / "cache.kv")
    loaded = package.load_cache(model, tmp_path / "cache.kv", mixed)
    assert loaded.recipe.entry_format == FORMATS
    assert_same(pack(cache.store), pack(loaded.store))  # codes too
    parts = [stepped_logits(model, ids[:, 90:120], x, [8, *[1] * 22]) for x in (cache, loaded)]
    torch.testing.assert_close(*parts, rtol=0, atol=1e-5)


def test_a_store_of_a_plan_has_its_formats(mixed):
    options = {"context_length": 110, "dtype": torch.float32}
    assert RaggedStore.from_plan(mixed, **options).entry_format == FORMATS
    assert RaggedStore.from_plan(mixed, format="model", **options).entry_format is None
    arenas = [type(layer.arena) for layer in RaggedStore.from_plan(mixed, **options).layers]
    assert arenas == [EncodedArena, LayerArena, EncodedArena]


def test_a_named_format_goes_before_the_plans_and_warns(model, mixed):
    options = {"context_length": 110}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert package.new_cache(model, mixed, **options).recipe.entry_format == FORMATS
        with attached(model, plan=mixed, **options):
            pass
    with pytest.warns(PlanWarning, match=r"entries in int4 in 1, model in 1, int8 in 1, but .* in int8 here"):
        assert package.new_cache(model, mixed, format="int8", **options).recipe.entry_format == INT8
    with pytest.warns(PlanWarning, match="kept in model here"):
        assert package.new_cache(model, mixed, format="model", **options).recipe.entry_format is None


def test_bytes_that_were_asked_for_are_kept(model):
    """Of a plan whose levels differ in formats, and whose layers do."""
    spec = ModelSpec.from_config(model.config)
    low, high = torch.full(spec.table_shape, 120), torch.full(spec.table_shape, 300)
    low[0] += 50
    plan = plan_of(spec, (low, MIXED), (high, None), context=400)
    full = 400 * 3 * 2 * 2 * 64
    for memory, expected in ((0.4, FORMATS), (0.6, FORMATS), (0.95, None)):
        cache = package.new_cache(model, plan, memory=memory)
        with torch.no_grad():
            model(tiny_ids(400), **over(cache))
        assert cache.recipe.entry_format == expected
        assert cache.nbytes <= memory * full
        assert cache.nbytes >= memory * full - 800 or cache.recipe.ask.retention > plan.retentions[1] - 1e-3
    with pytest.raises(PlanError, match=r"0\.\d+ of the entries go into these bytes, which is below the plan's lowest"):
        package.new_cache(model, plan, memory=0.15)
    with pytest.raises(BudgetError, match="fewest entries that the KV heads can be given"):
        package.new_cache(model, plan, memory=0.05)


def test_the_entries_of_a_level_are_its_own_however_they_round(model):
    """A tenth of 2412 entries is 241.2, and 241 are less than a tenth."""
    spec = ModelSpec.from_config(model.config)
    levels = ((torch.full(spec.table_shape, entries), None) for entries in (40, 120))
    plan = plan_of(spec, *levels, context=400)
    cost = torch.full(spec.table_shape, 7)
    for entries, expected in ((241, 0.1), (500, 500 / 2412), (723, 723 / 2412), (724, 724 / 2412)):
        budget = Budget(7 * entries, spec.table_shape, 1, 402, cost)
        assert plan_retention(plan, 402, lambda _, own=budget: own) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(PlanError, match=r"of 402 tokens 0\.1 of the entries go into these bytes, which is below"):
        plan_retention(plan, 402, lambda _: Budget(7 * 240, spec.table_shape, 1, 402, cost))


def test_costs_are_bytes_of_each_layer(model):
    spec = ModelSpec.from_config(model.config)
    costs = entry_costs(spec, torch.float32, scored=True, entry_format=FORMATS)
    own = [entry_nbytes(spec, torch.float32, scored=True, entry_format=x) for x in FORMATS.layers]
    assert costs.tolist() == [[x, x] for x in own]


def test_a_plan_with_formats_is_compared_at_equal_bytes(model, tmp_path):
    spec = ModelSpec.from_config(model.config)
    for formats, uniform in ((MIXED, "streaming/uniform"), (("int4",) * 3, "streaming/uniform@int4")):
        plan, sizes = plan_of(spec, (ragged_table(spec, 120, 200), formats), context=400), []
        path = str(tmp_path / f"{len(set(formats))}.json")
        save_plan(plan, path)
        for name in ("streaming", path):
            (method,) = read_asked([name])
            method = method.at(spec, 400, 0.3, torch.float32)
            table = method.table(spec, 400, 0.3, 0, torch.float32)
            cache = prompt_cache(model, method.policy, table, entry_format=method.entry_format)
            with torch.no_grad(), attached(model):
                model(tiny_ids(400), **over(cache))
            sizes.append(cache.nbytes)
        assert method.entry_format == plan.levels[0].entry_format
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-2)
        assert uniform in [method.name for method in read_methods([path])]
    (other,) = read_asked([f"{path}@model"])
    assert other.at(spec, 400, 0.3, torch.float32).entry_format is None
    (coded,) = read_asked([f"{path}@int4"])
    with pytest.raises(PlanError, match=r"of 400 tokens 0\.\d+ of the entries go into these bytes.*: give more bytes"):
        coded.table(spec, 400, 0.05, 0, torch.float32)


# --- the verbs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Heads of a size that has formats."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("wide") / "llama", head_dim=16)


@pytest.fixture(scope="module")
def small_plan(checkpoint, tmp_path_factory):
    spec = ModelSpec.from_config(AutoConfig.from_pretrained(checkpoint))
    path = tmp_path_factory.mktemp("formats") / "plan.json"
    save_plan(plan_of(spec, (torch.tensor([[60, 40], [80, 60]]), ("int4", "int8")), context=120), path)
    return path


def test_show_and_validate_say_the_formats(kvpolicy, small_plan, checkpoint):
    assert "int4 in 1, int8 in 1" in kvpolicy("show", small_plan).out
    said = kvpolicy("validate", small_plan, "--model", checkpoint)
    assert said.code == 0 and "50 % in int4 in 1, int8 in 1 kept" in said.out
    assert json.loads(kvpolicy("validate", small_plan, "--json").out)["formats"] == ["int4 in 1, int8 in 1"]


def test_eval_runs_the_formats(kvpolicy, small_plan, checkpoint, tiny_text, tmp_path):
    common = ["--model", checkpoint, "--dtype", "float32", "--context", 120, "--json"]
    text = [*common, "--text", tiny_text, "--limit", 2]
    own = json.loads(kvpolicy("eval", small_plan, *text).out)
    assert own["format"] == own["uniform"]["format"] == "int4 in 1, int8 in 1" and own["full"]["format"] == "model"
    other = json.loads(kvpolicy("eval", small_plan, *text, "--format", "model").out)
    assert other["format"] == "model" and other["entries"] == own["entries"]
    assert own["perplexity"] != other["perplexity"]
    questions = tmp_path / "mine.jsonl"
    row = {"context": "ba de fi " * 12, "question": "ku?", "answers": ["ba"]}
    questions.write_text("\n".join([json.dumps(row)] * 2))
    task = [*common, "--task-file", questions, "--limit", 2]
    own, other = (json.loads(kvpolicy("eval", small_plan, *task, *more).out) for more in ([], ["--format", "model"]))
    assert own["format"] == "int4 in 1, int8 in 1" and other["format"] == "model"
    assert own["entries"] == own["uniform"]["entries"]


def test_bench_and_generate_run_the_formats(kvpolicy, small_plan, checkpoint, tiny_text):
    common = ["--model", checkpoint, "--dtype", "float32", "--min-tokens", 8, "--json"]
    sizes = ["--context", 100, "--new-tokens", 2, "--repeats", 1, "--text", tiny_text]
    (row,) = json.loads(kvpolicy("bench", small_plan, *sizes, *common).out)["caches"]
    assert row["format"] == "int4 in 1, int8 in 1"
    (row,) = json.loads(kvpolicy("bench", "uniform", "--retention", 0.5, "--format", "int8", *sizes, *common).out)[
        "caches"
    ]
    assert row["format"] == "int8"
    said = json.loads(kvpolicy("generate", small_plan, "--prompt", "ba de fi", "--max-new-tokens", 2, *common).out)
    assert said["format"] == "int4 in 1, int8 in 1"
