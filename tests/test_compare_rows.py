"""What a row of a comparison holds: equal bytes, decode time, quantized caches, decoding from the first token on, what
a plan was calibrated on, and plans under another policy.
"""

import types

import pytest
import torch
from transformers import Cache, QuantizedCache

import kvpolicy
from kvpolicy import BudgetPlan, KVPolicyError, ModelSpec, PlanError, PromptProbe, TransformersProbe, registry
from kvpolicy.budget.plan import PlanChoice, PlanLevel, PlanMethod, PlanModel, save_plan
from kvpolicy.comparison import real_cache, task
from kvpolicy.comparison.calibration import calibration_of
from kvpolicy.comparison.decoding import DecodingTask
from kvpolicy.comparison.methods import read_methods
from kvpolicy.comparison.quality import figures
from kvpolicy.comparison.run import compare
from kvpolicy.comparison.task import PerplexityTask, RetrievalTask
from kvpolicy.integrations.transformers import cache_nbytes
from kvpolicy.integrations.transformers.attention.attachment import is_attached
from kvpolicy.integrations.transformers.cache import quantized
from kvpolicy.report.comparison_tables import markdown, tables
from tests.test_compare import PROMPT, Speller, questions
from tests.tiny import over, tiny_ids, tiny_model

LENGTH = 100
FP8 = "quantized/fp8"
needs_fp8 = pytest.mark.skipif('"fp8"' not in str(QuantizedCache.__doc__), reason="this transformers has no fp8 cache")


def task_of(model=None, count=2):
    return PerplexityTask(model or tiny_model("Llama"), tiny_ids(LENGTH, batch=count), prefill_length=PROMPT)


def named(name, *more):
    return next(method for method in read_methods([name, *more]) if method.name == name)


# --- equal bytes


@pytest.mark.parametrize("task", ["perplexity", "passkey"])
def test_rows_of_a_level_hold_equal_bytes_whether_or_not_they_hold_scores(tmp_path, task):
    """Entries of 2 * 64 numbers of 2 bytes: a score of 4 bytes beside each is 1.5 % of them."""
    model = tiny_model("Llama", layers=2, num_kv_heads=4, group=1, hidden_size=64, head_dim=64).bfloat16()
    asked = ["streaming", "streaming/adakv", "snapkv", "snapkv/adakv", "h2o", "expected_attention"]
    ids = tiny_ids(720, batch=2)
    made = PerplexityTask(model, ids, prefill_length=700)
    if task == "passkey":
        made = RetrievalTask(task, model, Speller(), questions(2))
        made.questions = [
            type(each)(row[:700], each.answer, 0.5, 3) for each, row in zip(questions(2), ids, strict=True)
        ]
        made.context = 700
    found = compare(made, read_methods(asked), [0.5], tmp_path / "c.json")
    level = [row for row in found.rows.values() if row.retention == 0.5]
    assert len(level) == 7 and [row.error for row in level] == [None] * 7
    assert max(each.excess_bytes for each in figures(found)) < 0.001
    entries = {row.method: row.entries for row in level}
    window = 0.5 * 700 * 8
    scored = round(window * (256 + 4) / (256 + 4 + 4))
    assert entries == {name: window if name == "streaming/uniform" else scored for name in entries}
    tables_of_a_segment = {
        row.bytes - row.entries * (260 if row.method == "streaming/uniform" else 264) for row in level
    }
    assert max(tables_of_a_segment) < 0.01 * level[0].bytes, "what is left is no entries"


# --- decode time


@pytest.mark.parametrize("name", ["full", "snapkv/uniform", pytest.param(FP8, marks=needs_fp8)])
def test_decode_time_is_the_median_of_single_tokens_behind_the_prompt(monkeypatch, name):
    model, clock, fed = tiny_model("Llama"), [0.0], []
    seconds = iter([99.0, 99.0, 99.0, *(0.001 * x for x in (16, 1, 15, 2, 14, 3, 13, 4, 12, 5, 11, 6, 10, 7, 9, 8))])

    def forward(_, args, given):
        (cache,) = (x for x in given.values() if isinstance(x, Cache))
        fed.append((tuple(args[0].shape), cache.get_seq_length()))
        clock[0] += next(seconds) if args[0].shape[1] == 1 else 1000.0

    monkeypatch.setattr(real_cache, "seconds_now", lambda _: clock[0])
    model.register_forward_pre_hook(forward, with_kwargs=True)
    prompt = tiny_ids(PROMPT)
    found = real_cache.decode_ms(model, named(name), torch.full((3, 2), PROMPT if "/" not in name else 20), prompt)
    assert found == pytest.approx(8.5), "of 1 to 16 ms; neither the prompt nor the first three count"
    assert fed == [((1, PROMPT), 0), *(((1, 1), PROMPT + step) for step in range(19))]
    assert not is_attached(model) and next(seconds, None) is None


@needs_fp8
def test_every_row_that_did_not_fail_has_a_decode_time(tmp_path):
    found = compare(task_of(), read_methods(["kvzip", FP8]), [0.5], tmp_path / "c.json")
    times = {row.method: row.decode_ms for row in found.rows.values()}
    assert times.pop("kvzip/uniform") is None, "its context cannot be repeated without a tokenizer"
    assert set(times) == {"full", FP8, "random/uniform"} and min(times.values()) > 0
    assert f"| {times['full']:.3g} |" in markdown(found)


def test_decoding_is_not_timed_where_nothing_could_be_told(tmp_path, monkeypatch):
    def timed(*_):
        raise AssertionError("decoding was timed")

    with monkeypatch.context() as patch:
        patch.setattr(task, "decode_ms", timed)
        found = compare(task_of(), read_methods(["tova"]), [0.5], tmp_path / "c.json", timing=False)
    assert {row.decode_ms for row in found.rows.values()} == {None} and "ms/token |" not in markdown(found)
    again = compare(task_of(), read_methods(["tova"]), [0.5], tmp_path / "c.json")
    assert all(row.decode_ms for row in again.rows.values()), "rows without a time are measured again for one"


def test_memory_that_runs_out_is_a_row_that_says_what_to_do(tmp_path, monkeypatch):
    measure = PerplexityTask.measure

    def full(self, method, table):
        if method.name == "tova/uniform":
            raise torch.OutOfMemoryError("CUDA out of memory. " + 50 * "Tried to allocate. ")
        return measure(self, method, table)

    monkeypatch.setattr(PerplexityTask, "measure", full)
    found = compare(task_of(), read_methods(["tova"]), [0.5], tmp_path / "c.json")
    assert found.rows["tova/uniform", 0.5].error == "out of memory on the device: try a smaller batch"


# --- quantized caches


def fp8_losses(model, ids, prompt):
    """Token by token over transformers' own cache."""
    cache, losses = QuantizedCache("fp8", model.config), []
    with torch.no_grad():
        logits = model(ids[:, :prompt], **over(cache)).logits[:, -1]
        for at in range(prompt, ids.shape[1]):
            losses.append(torch.nn.functional.cross_entropy(logits, ids[:, at]))
            logits = model(ids[:, at : at + 1], **over(cache)).logits[:, -1]
    return float(torch.stack(losses).double().mean())


@needs_fp8
@pytest.mark.parametrize("attached", [False, True])
def test_quantized_rows_are_those_of_transformers_own_cache(tmp_path, attached):
    model = tiny_model("Llama")
    task = PerplexityTask(model, tiny_ids(LENGTH, batch=2), prefill_length=PROMPT, batch_size=2)
    expected = [fp8_losses(model, ids[None], PROMPT) for ids in task.sequences]
    if attached:
        kvpolicy.attach(model)
    found = compare(task, read_methods([FP8, "tova"]), [0.5, 0.3], tmp_path / "c.json")
    assert is_attached(model) == attached
    row = found.rows[FP8, 1.0]
    torch.testing.assert_close(row.values(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert row.losses != found.rows["full", 1.0].losses
    numbers = 3 * 2 * PROMPT * (16 + 16)
    assert (row.bytes, row.dense_bytes, row.entries) == (numbers + 3 * 2 * 4, 4 * numbers, 3 * 2 * PROMPT)


@needs_fp8
def test_quantized_rows_stand_in_every_table_and_in_no_level(tmp_path):
    found = compare(task_of(), read_methods([FP8, "tova"]), [0.5, 0.3], tmp_path / "c.json")
    assert [row.method for row in found.rows.values() if row.method.startswith("quantized")] == [FP8]
    page = markdown(found)
    assert page.count("\n| quantized/fp8 |") == 2 and found.levels == [0.5, 0.3] and "100 % kept" not in page
    assert len(list(tables(found))) == 2
    said = {each.method: each for each in figures(found)}[FP8]
    assert (said.versus_uniform, said.versus_random, said.share, said.note) == ("", "", None, "")
    assert said.excess is not None and said.excess_bytes == 0 and said.calibration["tokens"] == 0


@needs_fp8
def test_answers_over_a_quantized_cache_are_those_of_generate():
    model, table = tiny_model("Llama"), torch.full((3, 2), PROMPT)
    task = RetrievalTask("passkey", model, Speller(), questions(2), batch_size=2)
    for index, each in enumerate(task.questions):
        cache = QuantizedCache("fp8", model.config)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **over(cache)}
        expected = model.generate(each.ids[None], **options)[0, PROMPT:]
        answers, held = task._answers(index, named(FP8), table)
        assert answers == [" ".join(map(str, expected.tolist()))] and held.entries == 6 * PROMPT
    assert len(task.measure(named(FP8), lambda _: table).losses) == 2


def test_a_row_says_which_package_a_quantized_cache_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "is_optimum_quanto_available", lambda: False)
    found = compare(task_of(), read_methods(["quantized/int4"]), [0.5], tmp_path / "c.json")
    assert found.rows["quantized/int4", 1.0].error == (
        "a cache in int4 needs the package optimum-quanto: pip install optimum-quanto"
    )


@needs_fp8
def test_a_model_that_transformers_does_not_quantize_says_so(tmp_path):
    found = compare(task_of(tiny_model("Qwen2Window")), read_methods([FP8]), [0.5], tmp_path / "c.json")
    error = found.rows[FP8, 1.0].error
    assert error.startswith("transformers makes no cache in fp8 for Qwen2ForCausalLM") and "sliding" in error


@pytest.mark.parametrize("bits", [4, 2])
def test_bytes_of_packed_numbers_are_those_of_the_package_that_packs_them(tmp_path, bits):
    pytest.importorskip("optimum.quanto")
    model = tiny_model("Llama", num_kv_heads=4)  # 4 * 16 numbers of a token are a group of 64
    found = compare(task_of(model), read_methods([f"quantized/int{bits}"]), [0.5], tmp_path / "c.json")
    row, numbers = found.rows[f"quantized/int{bits}", 1.0], 3 * 4 * PROMPT * (16 + 16)
    assert row.error is None and row.bytes == numbers * bits // 8 + numbers // 64 * (4 + 4), (
        "a scale and a shift a group"
    )
    assert row.losses != found.rows["full", 1.0].losses


def test_bytes_of_tensors_made_of_others_are_those_of_the_others():
    inner = types.SimpleNamespace(_data=torch.zeros(10, dtype=torch.uint8))
    inner.__tensor_flatten__ = lambda: (["_data"], None)
    outer = types.SimpleNamespace(_packed=inner, _scale=torch.zeros(3))
    outer.__tensor_flatten__ = lambda: (["_packed", "_scale"], None)
    rest = torch.zeros(7, dtype=torch.bfloat16)
    layer = types.SimpleNamespace(a=outer, b=[(rest, {"x": torch.zeros(2)})], again=rest[:3], name="layer", none=None)
    assert cache_nbytes(types.SimpleNamespace(layers=[layer])) == 10 + 12 + 14 + 8


# --- decoding from the first token on


def test_from_the_first_token_on_rows_are_the_losses_of_the_window_rule(tmp_path):
    model, ids = tiny_model("Llama"), tiny_ids(LENGTH, batch=2)
    task = DecodingTask(model, ids, batch_size=2)
    asked = ["streaming/pyramid", "snapkv", "streaming/adakv", FP8]
    found = compare(task, read_methods(asked), [0.5], tmp_path / "c.json")
    probe = TransformersProbe(model, ids, num_sink_tokens=4)
    torch.testing.assert_close(found.rows["full", 1.0].values(), probe.full_loss(), rtol=1e-6, atol=0)
    uniform = found.rows["streaming/uniform", 0.5]
    torch.testing.assert_close(uniform.values(), probe.loss(torch.full((3, 2), 50)), rtol=1e-6, atol=0)
    assert uniform.entries == 300 and uniform.dense_bytes == 6 * LENGTH * 32 * 4 and uniform.decode_ms > 0
    assert found.rows["streaming/pyramid", 0.5].losses != uniform.losses
    failed = {row.method for row in found.rows.values() if row.error is not None}
    assert failed == {"random/uniform", "snapkv/uniform", "streaming/adakv", FP8}
    assert "measured under a window rule alone" in found.rows["random/uniform", 0.5].error
    page = markdown(found)
    assert "| random/uniform | failed |  |" in page
    assert "| failed: streaming/adakv: prefill=0 decodes from the first token" in page
    assert "every token is decoded under the budget" in task.described


def test_rows_of_one_protocol_are_refused_in_the_table_of_the_other(tmp_path):
    model, ids, out = tiny_model("Llama"), tiny_ids(LENGTH, batch=2), tmp_path / "c.json"
    compare(PerplexityTask(model, ids, prefill_length=PROMPT), read_methods([]), [0.5], out)
    with pytest.raises(KVPolicyError, match=r"prompt_length was 80, now 100, protocol was prompt, now window"):
        compare(DecodingTask(model, ids), read_methods([]), [0.5], out)


# --- plans


def tuned(path=None, *, calibration=None, retentions=(0.25, 0.5)):
    """A plan that was tuned for streaming, with one large KV head."""
    spec = ModelSpec.from_config(tiny_model("Llama").config)
    levels = []
    for retention in retentions:
        shares = torch.full((3, 2), retention, dtype=torch.float64)
        shares[0] = torch.tensor([1.5, 0.5]) * retention
        levels.append(PlanLevel(retention, shares))
    method = PlanMethod(None, PlanChoice("power"), PlanChoice("streaming", {"num_sink_tokens": 4}))
    provenance = {"trials": 7, "search_sequences": 4, "context_length": PROMPT}
    if calibration is not None:
        provenance["calibration"] = calibration
    plan = BudgetPlan(PlanModel.from_spec(spec, ""), method, None, tuple(levels), provenance)
    if path is not None:
        save_plan(plan, path)
    return plan


RECORDS = [
    {"retention": None, "tokens": 1_000, "forwards": 10, "seconds": 1.5},
    {"retention": 0.25, "tokens": 20_000, "forwards": 200, "seconds": 20.0},
    {"retention": 0.5, "tokens": 300_000, "forwards": 3_000, "seconds": 300.0},
]


@pytest.mark.parametrize(
    ("retention", "tokens", "forwards", "seconds"),
    [
        (0.25, 21_000, 210, 21.5),
        (0.5, 301_000, 3_010, 301.5),
        (0.4, 321_000, 3_210, 321.5),  # between two levels: both
        (0.9, 301_000, 3_010, 301.5),  # between one and the full cache
        (0.1, 1_000, 10, 1.5),  # no level is used: the plan does not reach so low
    ],
)
def test_calibration_is_that_of_profiling_and_of_the_levels_that_are_used(retention, tokens, forwards, seconds):
    found = calibration_of(tuned(calibration=RECORDS), retention)
    assert (found["tokens"], found["forwards"], found["seconds"]) == (tokens, forwards, seconds)
    assert found["trials"] == 7


def test_what_a_plan_does_not_record_is_not_made_up():
    assert calibration_of(tuned(), 0.5) == {"trials": 7, "search_sequences": 4, "context_length": PROMPT}
    nothing = {"tokens": 0, "forwards": 0, "seconds": 0.0}
    spec = ModelSpec.from_config(tiny_model("Llama").config)
    assert calibration_of(None, 0.5) == nothing
    assert calibration_of(BudgetPlan.from_capacities(spec, torch.full((3, 2), 9), 30), 0.3) == nothing
    with pytest.raises(PlanError, match=r"provenance.calibration\[0\].forwards is -1, expected a whole number"):
        calibration_of(tuned(calibration=[RECORDS[0] | {"forwards": -1}]), 0.5)


def test_a_plan_under_another_policy_is_compared_with_that_policys_uniform(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    plan = tuned(tmp_path / "plan.json", calibration=RECORDS)
    methods = read_methods(["snapkv/plan.json"])
    names = ["full", "random/uniform", "snapkv/uniform", "snapkv/plan.json", "snapkv/plan.json shuffled"]
    assert [method.name for method in methods] == names
    task = task_of()
    found = compare(task, methods, [0.5], tmp_path / "c.json")
    row = found.rows["snapkv/plan.json", 0.5]
    assert row.uniform == "snapkv/uniform" and row.error is None
    table = methods[3].table(task.spec, PROMPT, 0.5, 0, torch.float32)
    assert (table - plan.capacities(PROMPT, 0.5) * 132 / 136).abs().max() <= 1
    probe = PromptProbe(task.model, task.sequences, policy=registry.create("policy", "snapkv"), prefill_length=PROMPT)
    torch.testing.assert_close(row.values(), probe.loss(table), rtol=1e-6, atol=0)
    note = {each.method: each.note for each in figures(found)}["snapkv/plan.json"]
    assert note.startswith("the plan was tuned for the policy 'streaming'") and not recwarn.list
    assert note in markdown(found) and "| 301k tokens, 3010 forwards, 302 s |" in markdown(found)
    assert f"snapkv/plan.json: {note}" in next(iter(tables(found)))[1]


def test_a_plan_in_a_folder_named_like_a_policy_is_that_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapkv").mkdir()
    tuned(tmp_path / "snapkv" / "plan.json")
    assert named("snapkv/plan.json").policy_name == "streaming"
    for name, missing in (("gone/plan.json", "gone/plan.json"), ("snapkv/gone.json", "gone.json")):
        with pytest.raises(PlanError, match=f"plan file '{missing}'"):
            read_methods([name])
