"""Comparing methods: what is compared, what is measured, what is said about it, and going on with a file."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import BudgetError, BudgetPlan, KVPolicyError, ModelSpec, PluginError, PromptProbe, TextError, registry
from kvpolicy.budget.plan import PlanChoice, save_plan
from kvpolicy.cli.terminal import Console
from kvpolicy.comparison.methods import read_methods
from kvpolicy.comparison.quality import figures
from kvpolicy.comparison.real_cache import filled_cache, ready, weighed
from kvpolicy.comparison.results_file import Comparison, Row, load_comparison
from kvpolicy.comparison.run import compare
from kvpolicy.comparison.task import PerplexityTask, RetrievalTask
from kvpolicy.measure.evaluation import CacheBytes
from kvpolicy.report.comparison_figure import pareto_front
from kvpolicy.report.comparison_tables import markdown, tables
from kvpolicy.tasks.questions import Question, make_key_values, make_passkeys, recalled
from tests.tiny import over, tiny_ids, tiny_model
from tests.tiny_checkpoint import tiny_tokenizer

LENGTH, PROMPT = 100, 80
CONTROLS = ["full", "random/uniform"]


def names(*asked):
    return [method.name for method in read_methods(asked)]


def task_of(model=None, count=3, length=LENGTH, prompt=PROMPT):
    return PerplexityTask(model or tiny_model("Llama"), tiny_ids(length, batch=count), prefill_length=prompt)


# --- what is compared


def test_controls_are_always_there_and_policies_stand_together():
    assert names() == CONTROLS
    asked = ["snapkv/adakv", "streaming/pyramid", "snapkv", "full", "random"]
    snapkv, streaming = ["snapkv/uniform", "snapkv/adakv"], ["streaming/uniform", "streaming/pyramid"]
    assert names(*asked) == [*CONTROLS, *snapkv, *streaming, "streaming/pyramid shuffled"]


def test_a_plan_brings_its_policy_uniform_and_shuffled(tmp_path):
    spec = ModelSpec.from_config(tiny_model("Llama").config)
    table = torch.tensor([[10, 20], [30, 40], [50, 60]])
    path = tmp_path / "plan.json"
    save_plan(BudgetPlan.from_capacities(spec, table, PROMPT, PlanChoice("snapkv", {"kernel_size": 7})), path)
    methods = {method.name: method for method in read_methods([str(path), "snapkv"])}
    own = "snapkv(kernel_size=7)/uniform"
    assert list(methods) == [*CONTROLS, own, str(path), f"{path} shuffled", "snapkv/uniform"]
    assert methods[str(path)].uniform_name == own
    retention = int(table.sum()) / (6 * PROMPT)
    own = methods[str(path)].table(spec, PROMPT, retention, 0, torch.float32)
    assert int(own.sum()) == round(210 * 132 / 136), "a score of 4 bytes beside 128 of key and value, 4 of position"
    assert int((own - table * 132 / 136).abs().max()) == 0, "the plan's proportions, up to one entry"
    shuffled = [methods[f"{path} shuffled"].table(spec, PROMPT, retention, seed, torch.float32) for seed in (0, 0, 1)]
    assert torch.equal(shuffled[0], shuffled[1]) and not torch.equal(shuffled[0], shuffled[2])
    assert sorted(shuffled[0].flatten().tolist()) == sorted(own.flatten().tolist())
    assert not torch.equal(shuffled[0], own)


def test_parameters_stand_behind_a_name():
    small, pooled = "snapkv(kernel_size=3, pooling=max)", "snapkv(kernel_size=3)/pyramid(beta=5)"
    methods = {method.name: method for method in read_methods([small, pooled, "snapkv(kernel_size=5)"])}
    shuffled = f"{pooled} shuffled"
    assert list(methods) == [
        *CONTROLS,
        f"{small}/uniform",
        "snapkv(kernel_size=3)/uniform",
        pooled,
        shuffled,
        "snapkv/uniform",
    ]
    assert (methods[f"{small}/uniform"].policy.kernel_size, methods[f"{small}/uniform"].policy.pooling) == (3, "max")
    assert methods[pooled].allocator.beta == 5 and methods[pooled].uniform_name == "snapkv(kernel_size=3)/uniform"
    assert methods["snapkv/uniform"].identity != methods[f"{small}/uniform"].identity
    assert names(*list(methods)[2:5], "snapkv/uniform") == list(methods), "names that are printed are read"


def test_a_plan_under_a_policy_with_parameters(tmp_path):
    spec = ModelSpec.from_config(tiny_model("Llama").config)
    path = tmp_path / "plan.json"
    save_plan(BudgetPlan.from_capacities(spec, torch.full((3, 2), 40), PROMPT), path)
    method = read_methods([f"snapkv(kernel_size=3)/{path}"])[3]
    assert (method.policy_name, method.policy.kernel_size, method.plan.method.policy.name) == ("snapkv", 3, "streaming")
    assert method.uniform_name == "snapkv(kernel_size=3)/uniform"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("snapkv(kernel=3)", "there is no parameter 'kernel' (did you mean 'kernel_size'?)"),
        ("snapkv(kernel_size=three)", "'kernel_size' is 'three', expected int"),
        ("snapkv(3)", "'snapkv(3)' expects NAME=VALUE, got '3'"),
        ("snapkv(kernel_size=3", "written as NAME(PARAMETER=VALUE, ...), got 'snapkv(kernel_size=3'"),
        ("snapkv/pyramid(alpha=3)", "there is no parameter 'alpha'"),
        ("snapkw", "no policy named 'snapkw'"),
        ("snapkv/pyramyd", "no allocator named 'pyramyd'"),
        ("snapkv/", "POLICY/ALLOCATOR, POLICY, POLICY/PLAN, or a plan file, got 'snapkv/'"),
        ("", "POLICY/ALLOCATOR, POLICY, POLICY/PLAN, or a plan file, got ''"),
        ("quantized/int3", "no method 'quantized/int3'; there is: quantized/fp8, quantized/int4, quantized/int2"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, expected):
    with pytest.raises(PluginError, match=re.escape(expected)):
        read_methods([name])


# --- what is measured


def test_rows_are_the_losses_of_the_probe_at_equal_bytes(tmp_path):
    model, prompt = tiny_model("Llama"), 200
    task, out = task_of(model, length=220, prompt=prompt), tmp_path / "c.json"
    found = compare(task, read_methods(["snapkv/adakv", "streaming/pyramid"]), [0.5, 0.3], out)
    assert [row.error for row in found.rows.values()] == [None] * len(found.rows) and len(found.rows) == 1 + 2 * 6
    for retention in (0.5, 0.3):
        level = [row for row in found.rows.values() if row.retention == retention]
        whole = round(retention * prompt * 6)
        scored = round(whole * 132 / 136)  # a score of 4 bytes beside 128 of key and value, and 4 of position
        names = ("streaming/uniform", "streaming/pyramid", "streaming/pyramid shuffled")
        assert {row.method: row.entries for row in level} == {
            row.method: whole if row.method in names else scored for row in level
        }
        assert len({row.losses for row in level}) == 6, "six methods that keep different entries"
    ids = task.sequences
    for name, allocator in (("snapkv/uniform", None), ("snapkv/adakv", "adakv"), ("streaming/uniform", None)):
        splits = None if allocator is None else registry.create("allocator", allocator)
        policy = registry.create("policy", name.partition("/")[0])
        probe = PromptProbe(model, ids, policy=policy, prefill_length=prompt, allocator=splits)
        table = torch.full((3, 2), 100 if name == "streaming/uniform" else 97)
        torch.testing.assert_close(found.rows[name, 0.5].values(), probe.loss(table), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.rows["full", 1.0].values(), probe.full_loss(), rtol=1e-5, atol=0)
    again = load_comparison(out)
    assert again.rows == found.rows and again.settings == found.settings


def test_a_method_that_fails_is_a_row_that_says_why(tmp_path, monkeypatch):
    original = PerplexityTask.measure

    def broken(self, method, table):
        if method.policy_name == "h2o":
            raise ZeroDivisionError("by\nzero")
        return original(self, method, table)

    monkeypatch.setattr(PerplexityTask, "measure", broken)
    found = compare(task_of(), read_methods(["h2o", "snapkv/baklava", "tova"]), [0.5, 0.01], tmp_path / "c.json")
    errors = {key: row.error for key, row in found.rows.items()}
    assert errors["h2o/uniform", 0.5] == "ZeroDivisionError: by zero"
    assert "needs importance that was measured on a model" in errors["snapkv/baklava", 0.5]
    assert errors["tova/uniform", 0.5] is None and errors["full", 1.0] is None
    assert "| h2o/uniform | failed |" in markdown(found)
    assert "| failed: ZeroDivisionError: by zero |" in markdown(found)


def test_without_the_full_cache_there_is_nothing_to_compare_with(tmp_path, monkeypatch):
    monkeypatch.setattr(PerplexityTask, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(task_of(), read_methods([]), [0.5], tmp_path / "c.json")


# --- going on


@pytest.fixture
def measured(monkeypatch):
    """The names of the methods that are measured from now on."""
    seen, original = [], PerplexityTask.measure

    def measure(self, method, table):
        seen.append(method.name)
        if len(seen) == seen_limit[0]:
            raise KeyboardInterrupt
        return original(self, method, table)

    seen_limit = [0]
    seen_of = type("Seen", (), {"names": seen, "limit": seen_limit})
    monkeypatch.setattr(PerplexityTask, "measure", measure)
    return seen_of


def test_an_interrupted_run_is_gone_on_with(tmp_path, measured):
    out, methods = tmp_path / "c.json", read_methods(["tova"])
    whole = compare(task_of(), methods, [0.5, 0.3], tmp_path / "whole.json")
    measured.names.clear()
    measured.limit[0] = 4
    with pytest.raises(KeyboardInterrupt):
        compare(task_of(), methods, [0.5, 0.3], out)
    assert list(load_comparison(out).rows) == [("full", 1.0), ("random/uniform", 0.5), ("random/uniform", 0.3)]
    measured.limit[0] = 0
    measured.names.clear()
    found = compare(task_of(), methods, [0.5, 0.3], out)
    assert measured.names == ["tova/uniform"] * 2
    assert list(found.rows) == list(whole.rows)
    for key, row in found.rows.items():
        torch.testing.assert_close(row.values(), whole.rows[key].values(), rtol=1e-6, atol=0)
    measured.names.clear()
    more = compare(task_of(), read_methods(["keydiff"]), [0.5], out)
    assert measured.names == ["keydiff/uniform"] and ("tova/uniform", 0.3) in more.rows


def test_rows_of_another_device_are_gone_on_with_unless_they_are_timed(tmp_path, monkeypatch):
    out = tmp_path / "c.json"
    monkeypatch.setattr("kvpolicy.comparison.run.device_name", lambda device: "a GPU")
    compare(task_of(), read_methods(["tova"]), [0.5], out)
    assert {row.device for row in load_comparison(out).rows.values()} == {"a GPU"}
    assert "- device: a GPU\n" in markdown(load_comparison(out))
    monkeypatch.undo()
    found = compare(task_of(), read_methods(["tova", "l2norm"]), [0.5], out, timing=False)
    assert "- device: a GPU; cpu for l2norm/uniform\n" in markdown(found)
    found = compare(task_of(), read_methods(["tova", "l2norm"]), [0.5], out)
    assert {row.device for row in found.rows.values()} == {"cpu"} and "- device: cpu\n" in markdown(found)


def test_a_row_of_another_plan_of_that_name_or_that_failed_is_measured_again(tmp_path, measured):
    model, path, out = tiny_model("Llama"), tmp_path / "plan.json", tmp_path / "c.json"
    spec = ModelSpec.from_config(model.config)
    for table in ([[20, 60], [40, 40], [40, 40]], [[60, 20], [40, 40], [40, 40]]):
        save_plan(BudgetPlan.from_capacities(spec, table, PROMPT), path)
        measured.names.clear()
        found = compare(task_of(model), read_methods([str(path)]), [0.5], out)
        assert measured.names[-2:] == [str(path), f"{path} shuffled"]
    assert len(measured.names) == 2, "the controls were there"
    document = json.loads(out.read_text())
    document["rows"][1] |= {"error": "out of memory", "losses": []}
    out.write_text(json.dumps(document))
    measured.names.clear()
    again = compare(task_of(model), read_methods([str(path)]), [0.5], out).rows
    assert {key: replace(row, decode_ms=0) for key, row in again.items()} == {
        key: replace(row, decode_ms=0) for key, row in found.rows.items()
    }
    assert measured.names == ["random/uniform"]


def test_other_settings_are_refused(tmp_path):
    out, methods = tmp_path / "c.json", read_methods([])
    compare(task_of(), methods, [0.5], out, settings={"dtype": "float32"})
    before = out.read_bytes()
    with pytest.raises(KVPolicyError, match=r"settings \(dtype was float32, now bfloat16\): choose another file"):
        compare(task_of(), methods, [0.5], out, settings={"dtype": "bfloat16"})
    with pytest.raises(KVPolicyError, match=r"seed was 0, now 1"):
        compare(task_of(), methods, [0.5], out, seed=1, settings={"dtype": "float32"})
    with pytest.raises(KVPolicyError, match=r"sequences was \[3, 100\], now \[2, 100\], tokens_sha256 was"):
        compare(task_of(count=2), methods, [0.5], out, settings={"dtype": "float32"})
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.update(format="kvpolicy-plan"), "format is no 'kvpolicy-comparison'"),
        (lambda x: x.update(version=1), "version is 1, expected 2: another kvpolicy measured its rows"),
        (lambda x: x["settings"].pop("seed"), "settings lacks task or seed"),
        (lambda x: x["rows"][0].pop("bytes"), r"rows\[0\].bytes is missing"),
        (lambda x: x["rows"][0].update(losses=[]), r"rows\[0\].losses is empty"),
        (lambda x: x["rows"][0]["losses"].pop(), r"rows have \[2, 3\] losses"),
        *[
            (lambda x, bad=bad: x["rows"][1].update(retention=bad), rf"rows\[1\]\.retention is {bad}, expected")
            for bad in (0, -1, 1.5, 2)
        ],
        (
            lambda x: x["rows"][0].update(losses=[1.0, 2.0, 701.0]),
            r"rows\[0\]\.losses\[2\] is 701\.0, expected a number",
        ),
        (lambda x: x["rows"][0].update(bytes=0), r"rows\[0\]\.bytes or dense_bytes is 0"),
        (lambda x: x["rows"][0].update(entries=-1), r"rows\[0\]\.entries is -1, expected a number from 0"),
        (lambda x: x["rows"][0]["calibration"].update(forwards="many"), r"rows\[0\]\.calibration\.forwards is 'many'"),
        (lambda x: x["rows"].append(x["rows"][0]), "rows has one method twice"),
        (lambda x: x["settings"].update(task="x"), "settings.task is 'x', expected one of perplexity"),
        (lambda x: x["settings"].update(seed=[]), "settings.seed is a list"),
        (lambda x: x["about"].update(model="\ud800"), "about.model is .* half a character"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, expected):
    out = tmp_path / "c.json"
    compare(task_of(), read_methods([]), [0.5], out)
    document = json.loads(out.read_text())
    change(document)
    out.write_text(json.dumps(document))
    with pytest.raises(KVPolicyError, match=f"c.json cannot be read as a comparison: {expected}.*; choose another"):
        load_comparison(out)


# --- what is said


def test_names_are_nothing_but_text_in_the_page():
    name = "a\n\n# b <script>x</script> | ![i](http://x) `c` \x1b[31m \\"
    page = markdown(comparison_of(("full", BASE, 90), (name, BASE, 9)))
    safe = r"a # b &lt;script&gt;x&lt;/script&gt; \| !\[i\](http://x) \`c\` " + "\ufffd" + r"\[31m \\"
    assert f"| {safe} |" in page and "<script" not in page and "\x1b" not in page


def test_names_are_nothing_but_text_in_the_tables(capsys):
    for table, _ in tables(comparison_of(("full", BASE, 90), ("[red]x[/no]", BASE, 9))):
        Console().print(table)
    assert "[red]x[/no]" in capsys.readouterr().out


def comparison_of(*rows, task="perplexity"):
    """Rows (method, losses, bytes) at 0.5, the first one being full's."""
    made = [
        Row(name, 1.0 if name == "full" else 0.5, {}, "p/uniform", losses=tuple(losses), bytes=held, dense_bytes=200)
        for name, losses, held in rows
    ]
    return Comparison({"task": task, "seed": 0}, {}, {row.key: row for row in made})


def said(*rows, **more):
    return {each.method: each for each in figures(comparison_of(*rows, **more))}


BASE = [2.0, 2.2, 1.8, 2.1, 1.9, 2.05, 1.95, 2.0]


def plus(*differences):
    return [a + b for a, b in zip(BASE, itertools.cycle(differences), strict=False)]


def test_excess_is_that_of_perplexity_and_paired():
    found = said(("full", BASE, 100), ("p/uniform", plus(0.1), 50))["p/uniform"]
    assert found.quality == pytest.approx(math.exp(2.1))
    assert (found.excess, found.low, found.high) == pytest.approx([math.exp(0.1) - 1] * 3)
    assert said(("full", BASE, 100))["full"].excess is None


def test_the_share_of_uniforms_excess_is_that_of_perplexities():
    rows = ("full", BASE, 100), ("p/uniform", plus(0.2, 0.4), 50), ("p/x", plus(0.1, 0.2, 0.0), 50)
    found = said(*rows)
    full, uniform, ours = (math.exp(sum(losses) / 8) for _, losses, _ in rows)
    share = found["p/x"].share
    assert share.mean == pytest.approx((ours - full) / (uniform - full)) and share.low < share.mean < share.high < 1
    cell = f"{share.mean:.0%}, {share.low:.0%} to {share.high:.0%}"
    assert f"| {cell} |" in markdown(comparison_of(*rows))
    assert found["p/uniform"].share is None and found["full"].share is None
    assert said(*rows[:2], ("p/x", BASE, 51))["p/x"].share is None, "more bytes"
    assert said(rows[0], ("p/uniform", plus(0.3, -0.3), 50), rows[2])["p/x"].share is None, "uniform costs nothing"
    assert said(*rows, task="passkey")["p/x"].share is None


def test_a_budget_below_the_sink_tokens_is_not_an_equal_one(tmp_path):
    found = compare(task_of(), read_methods(["tova"]), [0.02], tmp_path / "c.json")
    entries = {name: row.entries for (name, _), row in found.rows.items()}
    assert (entries["tova/uniform"], entries["random/uniform"]) == (10, 30), "5 of each KV head are the least of random"
    notes = {each.method: each.note for each in figures(found)}
    assert notes["random/uniform"].startswith("bytes not equal") and notes["tova/uniform"] == ""


@pytest.mark.parametrize(
    ("differences", "held", "expected"),
    [
        ((-0.1,), 50, "better"),
        ((0.1,), 50, "worse"),
        ((-0.3, 0.2), 50, "unclear"),
        ((-0.001, -0.002), 50, "better"),
        ((-0.1,), 51, "more bytes"),
        ((-0.1,), 49, "better"),
    ],
)
def test_only_what_the_interval_and_the_bytes_carry_is_said(differences, held, expected):
    """The mean of the third is below uniform's, and its interval meets it."""
    rows = ("full", BASE, 100), ("p/uniform", plus(0.5), 50), ("p/x", plus(*(0.5 + d for d in differences)), held)
    found = said(*rows)
    assert found["p/x"].versus_uniform == expected
    assert found["p/x"].versus_random == "" and found["p/uniform"].versus_uniform == ""


def test_rows_whose_bytes_are_not_equal_say_so():
    found = said(("full", BASE, 100), ("p/uniform", BASE, 1000), ("p/x", BASE, 1009), ("p/y", BASE, 1020))
    assert found["p/x"].note == "" and found["full"].note == ""
    assert found["p/y"].note == "bytes not equal: 2.0% above the smallest of the level"
    page = markdown(comparison_of(("full", BASE, 9000), ("p/uniform", BASE, 1000), ("p/y", BASE, 1020)))
    assert "The bytes of this level are not equal: they differ by 2.00%, more than 1%." in page


def test_passkeys_are_counted():
    rows = ("full", [0.0] * 8, 100), ("p/uniform", [1.0] * 6 + [0.0] * 2, 50), ("p/x", [1.0] + [0.0] * 7, 50)
    found = said(*rows, task="passkey")
    assert (found["full"].quality, found["p/uniform"].quality, found["p/x"].quality) == (1.0, 0.25, 0.875)
    assert found["p/uniform"].excess == 0.75 and found["p/x"].versus_uniform == "better"
    none = comparison_of(("full", [1.0] * 8, 100), ("p/uniform", [1.0] * 8, 50), task="passkey")
    assert "Nothing was found with the full cache" in markdown(none)


def test_the_front_holds_what_no_other_beats():
    found = said(("full", BASE, 100), *((f"p/{i}", plus(d), b) for i, d, b in FRONT))
    assert [row.method for row in pareto_front([x for x in found.values() if x.excess is not None])] == ["p/a", "p/c"]


FRONT = [("a", 0.4, 10), ("b", 0.5, 20), ("c", 0.1, 30), ("d", 0.2, 30), ("e", 0.1, 40)]


# --- passkeys


def test_passkey_prompts_are_of_one_length_and_hold_their_number_once():
    tokenizer = tiny_tokenizer()
    found = make_passkeys(tokenizer, 4, 400, seed=3)
    texts = [tokenizer.decode(each.ids) for each in found]
    for each, text in zip(found, texts, strict=True):
        assert len(each.ids) == 400 and 10_000 <= int(each.answer) < 100_000
        assert text.count(f"The pass key is {each.answer}. Remember it.") == 1
        assert text.endswith("What is the pass key? The pass key is")
    assert sorted(int(4 * each.depth) for each in found) == [0, 1, 2, 3], "one in each quarter"
    places = [text.index("The pass key is") for text in texts]
    assert len(set(places)) > 1 and len({each.answer for each in found}) == 4
    again = make_passkeys(tokenizer, 4, 400, seed=3)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, again, strict=True))
    assert [each.answer for each in make_passkeys(tokenizer, 4, 400, seed=4)] != [each.answer for each in found]


def test_key_value_prompts_are_full_of_items_of_which_one_is_asked_for():
    tokenizer = tiny_tokenizer()
    found = make_key_values(tokenizer, 4, 600, seed=3)
    places = []
    for each in found:
        text = tokenizer.decode(each.ids)
        items = re.findall(r" Item (\d+) has number (\d+)\.", text)
        asked = re.search(r"Which number has item (\d+)\? Item \1 has number$", text)[1]
        assert len(each.ids) == 600 and len(items) > 10 and len(dict(items)) == len(items)
        assert dict(items)[asked] == each.answer
        places.append([name for name, _ in items].index(asked) / len(items))
    assert max(places) - min(places) > 0.4, "depths are spread"
    again = make_key_values(tokenizer, 4, 600, seed=3)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("make", [make_passkeys, make_key_values])
def test_a_prompt_without_room_is_refused(make):
    with pytest.raises(TextError, match="too short for this task: give at least") as caught:
        make(tiny_tokenizer(), 2, 50)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(make(tiny_tokenizer(), 1, least)[0].ids) == least


@pytest.mark.parametrize(
    ("text", "number"), [(" 12345. The", "12345"), (": 123456", "123456"), ("no", ""), ("7 12345", "7")]
)
def test_the_answer_is_its_first_number(text, number):
    assert recalled(text) == number


def questions(count=3):
    """Random prompts for the tiny model, in whose vocabulary the words do not fit."""
    return [Question(ids, str(10_000 + i), 0.5, 6) for i, ids in enumerate(tiny_ids(PROMPT, batch=count))]


class Speller:
    """Spells a token by its number."""

    def batch_decode(self, ids, **_):
        return [" ".join(map(str, row.tolist())) for row in ids]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kept", [PROMPT, 12])
def test_answers_are_greedy_over_the_compressed_prompt(kept, batch_size):
    model, table = tiny_model("Llama"), torch.full((3, 2), kept)
    (method,) = [each for each in read_methods(["snapkv"]) if each.name == "snapkv/uniform"]
    task = RetrievalTask("passkey", model, Speller(), questions(), batch_size=batch_size)
    plan = BudgetPlan.from_capacities(task.spec, table, PROMPT, PlanChoice("snapkv"))
    expected = []
    for each in questions():
        cache = kvpolicy.new_cache(model, plan, context_length=PROMPT, decode="append")
        tokens = each.ids[None]
        with torch.no_grad():
            for _ in range(6):
                fed = tokens if tokens.shape[1] == PROMPT else tokens[:, -1:]
                tokens = torch.cat([tokens, model(fed, **over(cache)).logits[:, -1:].argmax(-1)], 1)
        expected.append(" ".join(map(str, tokens[0, PROMPT:].tolist())))
    kvpolicy.detach(model)
    answers, held = task._answers(0, method, table)
    assert answers == expected[:batch_size]
    assert held.entries == 6 * kept and held.dense_bytes == 3 * 2 * PROMPT * (16 + 16) * 4
    assert len(task.measure(method, lambda _: table).losses) == 3


def test_a_policy_that_has_its_context_repeated_answers_too():
    model, tokenizer, table = tiny_model("Llama", vocab_size=400), tiny_tokenizer(), torch.full((3, 2), 12)
    (method,) = [each for each in read_methods(["kvzip"]) if each.name == "kvzip/uniform"]
    task = RetrievalTask("passkey", model, tokenizer, questions(2), batch_size=2)
    ids = torch.stack([each.ids for each in task.questions])
    plan = BudgetPlan.from_capacities(task.spec, table, PROMPT, PlanChoice("kvzip"))
    cache = kvpolicy.new_cache(model, plan, context_length=PROMPT, decode="append")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = kvpolicy.generate(model, cache, ids, tokenizer=tokenizer, **options)[:, PROMPT:]
    kvpolicy.detach(model)
    answers, held = task._answers(0, method, table)
    assert answers == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert held.entries == 6 * 12


def test_a_passkey_counts_where_its_number_is_said(monkeypatch):
    task = RetrievalTask("passkey", tiny_model("Llama"), Speller(), questions(4), batch_size=4)
    method = read_methods([])[1]
    answers = [" 10000.", "10001", " 10007", "none"]
    monkeypatch.setattr(task, "_answers", lambda *_: (answers, CacheBytes(1, 1, 1)))
    assert task.measure(method, lambda _: torch.full((3, 2), 9)).losses.tolist() == [0, 0, 1, 1]


def test_a_cache_that_holds_more_than_its_table_is_refused():
    task, table, method = task_of(), torch.full((3, 2), 20), read_methods([])[1]
    with ready(task.model, method):
        cache, _ = filled_cache(task.model, method, table, task.sequences[:2, :PROMPT])
    assert weighed(cache, table, task.spec, task.dtype).entries == 120
    with pytest.raises(BudgetError, match=r"holds \[120, 120\] entries in its rows, the table says 126"):
        weighed(cache, table + 1, task.spec, task.dtype)
