"""Searches whose levels are bytes, and whose entries have a format."""

import dataclasses

import pytest
import torch
from kvpolicy_kernels.formats import INT8

import kvpolicy
from kvpolicy import BudgetError, ModelSpec, PluginError
from kvpolicy.cache.weight import byte_budget, even_retention
from kvpolicy.integrations.transformers import TransformersProbe
from kvpolicy.measure.evaluation import perplexity
from kvpolicy.plugins.registry import registry
from kvpolicy.progress import Progress
from kvpolicy.tuning import tune
from kvpolicy.tuning.study_notes import StudyNotes
from tests.tiny import over, tiny_ids, tiny_model
from tests.tuning.searches import make_corpus, make_settings, run, the_study

CONTEXT = 192
FULL = CONTEXT * 2 * 2 * 2 * 64  # bytes in fp32 of 2 layers of 2 KV heads with 16 channels


@pytest.fixture(scope="module")
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_model("Llama", layers=2)
    torch.set_num_threads(before)


class Told(Progress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def settings_of(tmp_path, **changes):
    bytes_of = {"retentions": kvpolicy.tuning.settings.RETENTIONS} if "memories" in changes else {}
    return make_settings(tmp_path, **{"context_length": CONTEXT, "trials": 2, **bytes_of, **changes})


@pytest.mark.parametrize(
    ("policy", "params", "memories"),
    [("streaming", {}, (0.4, 0.32)), ("snapkv", {"observation_window": 8, "recent_window": 8}, (0.58, 0.5))],
)
def test_the_plan_has_the_format_and_the_bytes_that_were_asked_for(model, policy, params, memories, tmp_path):
    options = {"policy": policy, "policy_params": params, "memories": memories, "format": "int4"}
    plan = run(settings_of(tmp_path, **options), model)
    assert [level.formats for level in plan.levels] == [("int4", "int4")] * 2
    assert [pair["memory"] for pair in plan.provenance["memory"]] == [*memories]
    assert [pair["retention"] for pair in plan.provenance["memory"]] == [level.retention for level in plan.levels]
    context = CONTEXT if policy == "streaming" else CONTEXT // 2
    full = FULL * context / CONTEXT
    for level, memory in zip(plan.levels, memories, strict=True):
        cache = kvpolicy.new_cache(model, plan, retention=level.retention, context_length=context, min_tokens=8)
        with torch.no_grad():
            model(tiny_ids(context), **over(cache))
        assert memory * full - 1200 <= cache.nbytes <= memory * full


def test_bytes_are_of_16_bit_numbers_where_the_dtype_is_chosen_by_speed(model, tmp_path):
    told = Told()
    settings = settings_of(tmp_path, memories=(0.4,), format="int8", choose_dtype=True, trials=1)
    plan = tune(model, make_corpus(), settings, progress=told)
    assert "bytes are parts of what the full cache takes in bfloat16" in told.notes
    rule, spec = registry.create("policy", "streaming"), ModelSpec.from_config(model.config)
    budget = byte_budget(0.4, spec, CONTEXT, torch.bfloat16, rule, INT8, scored=False)
    assert plan.retentions == (pytest.approx(even_retention(budget), abs=1e-3),)


def test_held_out_figures_are_those_of_the_formats(model, tmp_path):
    corpus = make_corpus()
    plan = run(settings_of(tmp_path, format="int8"), model, corpus)
    (level,) = plan.levels
    sequences = corpus.sequences("heldout", 4, CONTEXT)
    plain = TransformersProbe(model, sequences)
    coded = TransformersProbe(model, sequences, entry_format=level.entry_format)
    table = plan.capacities(CONTEXT)
    assert level.perplexity["heldout"] == pytest.approx(perplexity(coded.loss(table)), rel=1e-9)
    assert level.perplexity["heldout"] != pytest.approx(perplexity(plain.loss(table)), rel=1e-9)
    assert level.perplexity["heldout_full"] == pytest.approx(perplexity(plain.full_loss()), rel=1e-9)
    assert plan.to_json()["version"] == 2


def test_capacities_are_learned_under_the_format(model, tmp_path):
    learned = {"allocator": "learned", "allocator_params": {"steps": 3}}
    settings = settings_of(tmp_path, memories=(0.35,), format="int4", **learned)
    plan = run(settings, model)
    assert int(plan.capacities(CONTEXT).min()) >= 36
    assert plan.levels[0].entry_format == kvpolicy.new_cache(model, plan, context_length=CONTEXT).recipe.entry_format
    shares = StudyNotes(the_study(settings, 0.35)).fitted_shares
    assert float(shares.min()) >= 36 and float(shares.std()) > 0
    again = run(dataclasses.replace(settings, resume=True), model)
    assert torch.equal(again.levels[0].shares, plan.levels[0].shares)


@pytest.mark.parametrize(("allocator", "params"), [("hull", None), ("learned", {"steps": 2})])
def test_auto_finds_a_format_for_each_layer(model, allocator, params, tmp_path):
    told = Told()
    how = {"estimator": "fisher", "allocator": allocator, "allocator_params": params}
    settings = settings_of(tmp_path, memories=(0.34, 0.28), format="auto", **how)
    plan = tune(model, make_corpus(), settings, progress=told)
    assert any(line.startswith("formats: up to 4 choices of each level") for line in told.notes)
    notes = [line for line in told.notes if line.startswith("formats at")]
    assert len(notes) == 2 and "int8" in notes[1] and "loss on the search's sequences" in notes[1]
    for level, memory in zip(plan.levels, (0.34, 0.28), strict=True):
        cache = kvpolicy.new_cache(model, plan, retention=level.retention, context_length=CONTEXT)
        with torch.no_grad():
            model(tiny_ids(CONTEXT), **over(cache))
        assert memory * FULL - 1200 <= cache.nbytes <= memory * FULL
        assert cache.recipe.entry_format == level.entry_format


def test_auto_is_refused_where_nothing_measures_formats(model, tmp_path):
    with pytest.raises(BudgetError, match="format=auto spends bytes"):
        settings_of(tmp_path, format="auto")
    with pytest.raises(PluginError, match=r"format=auto needs an estimator that measures .* and 'cosine' does not"):
        run(settings_of(tmp_path, memories=(0.4,), format="auto"), model)


def test_a_search_without_formats_is_named_as_it_was(model, tmp_path):
    settings = settings_of(tmp_path)
    assert run(settings, model).to_json()["version"] == 1
    study = the_study(settings)
    assert study.study_name.startswith("plan-0.4-")
    assert not {"format", "memory"} & set(StudyNotes(study).settings)


def test_what_cannot_be_searched_is_refused_before_the_work(model, tmp_path):
    for memory, said in (
        (0.1, "memory=0.1 is 9830 bytes for 192 tokens"),
        (0.99, "memory=0.99 holds a whole context in"),
    ):
        with pytest.raises(BudgetError, match=said):
            run(settings_of(tmp_path, memories=(memory,), format="int4"), model)
    with pytest.raises(BudgetError, match="format= must be one of model, int8, int4, think, got 'int3'"):
        settings_of(tmp_path, format="int3")
    with pytest.raises(BudgetError, match="memories= and retentions= were given"):
        make_settings(tmp_path, memories=(0.3,))
    with pytest.raises(BudgetError, match="a memory to tune must lie in"):
        settings_of(tmp_path, memories=(1.5,))


def test_the_verb_searches_bytes(kvpolicy, tiny_text, tmp_path, refused):
    from tests.tiny_checkpoint import save_tiny_checkpoint

    checkpoint = save_tiny_checkpoint(tmp_path / "llama", head_dim=16)
    common = ["--model", checkpoint, "--text", tiny_text, "--context", 160, "--dtype", "float32", "--trials", 1]
    out = tmp_path / "plan.json"
    said = kvpolicy("tune", *common, "--memory", 0.3, "--format", "int8", "--out", out, "--json")
    assert said.code == 0, said.err
    (level,) = said.json["levels"]
    assert level["formats"] == ["int8", "int8"] and said.json["memory"][0]["memory"] == 0.3
    assert "30% of the bytes" in said.err
    assert "--memory and --retention were given" in refused("tune", "--memory", 0.5, "--retention", 0.5)
    assert "--format must be one of" in refused("tune", "--format", "int3")
