"""The command line: good paths as JSON, and every bad input as one line and exit code 2."""

import json
import os
import signal
import subprocess

import pytest

from kvpolicy import load_plan
from kvpolicy.cli import app
from kvpolicy.tuning.storage import open_storage
from tests.command_line import FAST, KVPOLICY, Result, in_a_process
from tests.tiny_checkpoint import save_tiny_checkpoint, save_tiny_falcon, text_of

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.fixture
def tune(tiny_checkpoint, tiny_text, tmp_path):
    """The arguments of a small search into this test's directory; later ones win."""
    out = ["--out", str(tmp_path / "plan.json")]
    return ["tune", "--model", tiny_checkpoint, "--text", tiny_text, *FAST, "--trials", "2", "--retention", "0.5", *out]


# --- good paths


def test_tune_writes_a_plan_and_prints_its_figures(tuned):
    path, result = tuned
    plan = load_plan(path)
    assert [level["retention"] for level in result.json["levels"]] == [0.5, 0.3]
    for shown, level in zip(result.json["levels"], plan.levels, strict=True):
        assert shown["perplexity"] == level.perplexity
        assert shown["comparison"] == level.comparison
        total = round(level.retention * 64 * 4)
        assert int(plan.capacities(64, retention=level.retention).sum()) == total
    assert plan.provenance["trials"] == 3


def test_tune_says_what_it_costs_first_and_warns_of_nothing(tuned):
    _, result = tuned
    assert result.warnings == []
    assert "Warning" not in result.err
    lines = result.err.splitlines()
    cost = next(i for i, line in enumerate(lines) if "2 levels x 3 trials x 4 sequences of 64 tokens" in line)
    assert cost < next(i for i, line in enumerate(lines) if "trial 1/3" in line)


def test_quiet_is_quiet(kvpolicy, tune):
    result = kvpolicy(*tune, "--quiet", "--json")
    assert (result.code, result.err) == (0, "")


def test_tune_in_words_shows_the_levels_and_the_next_step(kvpolicy, tune, tmp_path):
    result = kvpolicy(*tune)
    assert result.code == 0
    assert f"plan written to {tmp_path / 'plan.json'}; look at it with: kvpolicy show" in result.out


def test_a_path_with_brackets_is_shown_as_it_is(kvpolicy, tune, tmp_path):
    out = tmp_path / "[red]plan[/blue].json"
    out.parent.mkdir()
    result = kvpolicy(*tune, "--out", out)
    assert result.code == 0
    assert str(out) in result.out
    assert load_plan(out).retentions == (0.5,)


@pytest.mark.parametrize("plan", ["PLAN", "uniform", "full"])
def test_eval_reports_quality_and_measured_bytes(kvpolicy, tuned, tiny_checkpoint, tiny_text, plan):
    name = str(tuned[0]) if plan == "PLAN" else plan
    kept = [] if plan == "full" else ["-r", "0.3"]
    row = kvpolicy("eval", name, "--model", tiny_checkpoint, "--text", tiny_text, *FAST, *kept, "--json").json
    assert row["interval"][0] < row["perplexity"] < row["interval"][1]
    assert {"task", "retention", "bytes", "dense_bytes", "n", "perplexity"} <= row.keys()
    assert (row["task"], row["plan"], row["n"]) == ("perplexity", name, 8)
    assert row["retention"] == (1.0 if plan == "full" else 0.3)
    assert row["dense_bytes"] == 2 * 2 * 64 * (8 + 8) * 4
    if plan == "full":
        assert row["bytes"] >= row["dense_bytes"]
    else:
        assert row["entries"] == round(0.3 * 64 * 4)
        assert row["entries"] * (8 + 8) * 4 < row["bytes"] < 0.35 * row["dense_bytes"], "a tenth for tables"


def test_eval_agrees_with_what_tune_reported(kvpolicy, tuned, tiny_text):
    """The plan names its model and context; both measure the held-out part."""
    path, _ = tuned
    rows = kvpolicy("eval", path, "--text", tiny_text, "--dtype", "float32", "--json").json
    levels = load_plan(path).levels
    assert [row["retention"] for row in rows] == [0.5, 0.3]
    for row, level in zip(rows, levels, strict=True):
        assert row["perplexity"] == pytest.approx(level.perplexity["heldout"], rel=1e-6)
    full = kvpolicy("eval", "full", "--model", load_plan(path).model.id, "--text", tiny_text, *FAST, "--json").json
    assert full["perplexity"] == pytest.approx(levels[0].perplexity["heldout_full"], rel=1e-6)


def test_show_prints_the_plan_and_writes_files(kvpolicy, tuned, tmp_path):
    path, _ = tuned
    html, png = tmp_path / "plan.html", tmp_path / "plan.png"
    result = kvpolicy("show", path, "--html", html, "--png", png, "--json")
    assert result.json == json.loads(path.read_text())
    assert html.read_text().lower().startswith("<!doctype html>")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [html, png]
    assert "50 %" in kvpolicy("show", path).out


def test_profile_gives_importance_of_every_kv_head(kvpolicy, tiny_checkpoint, tiny_text, tmp_path):
    out, png = tmp_path / "importance.json", tmp_path / "importance.png"
    options = ["--context", "64", "--param", "group=max", "--out", out, "--png", png, "--json"]
    found = kvpolicy("profile", "--model", tiny_checkpoint, "--text", tiny_text, *options).json
    assert [len(row) for row in found["per_head"]] == [2, 2]
    assert len(found["per_layer"]) == 2
    assert found["estimator"] == {"name": "cosine", "params": {"head_input": "value", "group": "max"}}
    assert json.loads(out.read_text()) == found
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("estimator", ["uniform", "layer_cosine", "entropy", "retrieval", "shuffled"])
def test_profile_by_every_estimator(kvpolicy, tiny_checkpoint, tiny_text, estimator):
    options = ["--estimator", estimator, "--context", "256", "--json"]
    found = kvpolicy("profile", "--model", tiny_checkpoint, "--text", tiny_text, *options).json
    assert [len(row) for row in found["per_head"]] == [2, 2]
    assert min(map(min, found["per_head"])) > 0
    assert found["estimator"]["name"] == estimator


def test_profile_by_sensitivity_says_its_cost_and_gives_curves(kvpolicy, tiny_checkpoint, tiny_text):
    options = ["--estimator", "sensitivity", "--context", "64", "--param", "sizes=[0.125, 0.5]", "--json"]
    result = kvpolicy("profile", "--model", tiny_checkpoint, "--text", tiny_text, *options)
    assert "'sensitivity' runs at most 9 forwards of up to 64 tokens" in result.err
    assert result.json["curve_capacities"] == [8, 32, 64]
    assert [[len(curve) for curve in row] for row in result.json["curves"]] == [[3, 3], [3, 3]]


def test_tune_says_what_the_estimator_costs(kvpolicy, tune):
    result = kvpolicy(*tune, "--estimator", "sensitivity", "--allocator", "power")
    # 4 sequences under 1 + 4 heads x 3 sizes tables
    assert "24 held-out sequences and 52 of 'sensitivity': at most 88 forwards" in result.err


def test_tune_by_hull_without_curves_says_who_has_some(refused, tune):
    message = refused(*tune, "--allocator", "hull")
    assert "hull: the importance has no curves" in message and "--estimator sensitivity" in message


def test_profile_by_retrieval_says_when_there_is_no_room(refused, tiny_checkpoint, tiny_text):
    options = ["--estimator", "retrieval", "--context", "64"]
    message = refused("profile", "--model", tiny_checkpoint, "--text", tiny_text, *options)
    assert "the longest has 64 tokens, give a larger context" in message


@pytest.mark.parametrize(
    ("estimator", "allocator"),
    [
        ("layer_cosine", "squeeze"),
        ("entropy", "zigzag"),
        ("retrieval", "headkv"),
        ("sensitivity", "power"),
        ("sensitivity", "hull"),
        ("fisher", "hull"),
    ],
)
def test_tune_with_the_estimator_that_an_allocator_is_made_for(kvpolicy, tune, tmp_path, estimator, allocator):
    methods = ["--estimator", estimator, "--allocator", allocator, "--context", "192"]
    assert kvpolicy(*tune, *methods).code == 0
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.method.estimator.name, plan.method.allocator.name) == (estimator, allocator)
    assert int(plan.capacities(context_length=192, retention=0.5).sum()) == round(0.5 * 192 * 2 * 2)


def test_estimate_equals_what_eval_measures_but_for_the_tables(kvpolicy, tiny_checkpoint):
    options = ["--context", "640", "--batch", "3", "--dtype", "float32", "--json"]
    one = kvpolicy("estimate", "--model", tiny_checkpoint, "-r", "0.3", *options).json
    assert one["kept_bytes"] == 3 * round(0.3 * 640 * 4) * (8 + 8) * 4
    assert one["dense_bytes"] == 3 * 163840
    scored = kvpolicy("estimate", "--model", tiny_checkpoint, "-r", "0.3", "--policy", "snapkv", *options).json
    assert scored["cache_bytes"] - one["cache_bytes"] == 4 * one["entries"]
    assert (one["policy"], scored["policy"]) == ("streaming", "snapkv")
    several = kvpolicy("estimate", "--model", tiny_checkpoint, *options).json
    assert [row["retention"] for row in several] == [0.5, 0.3, 0.1]


def test_plugins_lists_the_built_in_ones(kvpolicy):
    rows = kvpolicy("plugins", "--json").json
    named = {(row["role"], row["name"]): row for row in rows}
    policies = ("streaming", "h2o", "snapkv", "tova", "l2norm", "keydiff", "random", "corm", "r_kv", "kvzip")
    policies += ("kv_compress", "expected_attention", "critical_kv")
    allocators = ("baklava", "uniform", "pyramid", "adakv", "squeeze", "zigzag", "headkv", "kv_compress", "same_count")
    allocators += ("power", "hull", "learned", "cake")
    estimators = ("cosine", "uniform", "layer_cosine", "entropy", "retrieval", "shuffled", "sensitivity", "fisher")
    named_by_role = {"policy": policies, "allocator": allocators, "estimator": estimators}
    for key in [(role, name) for role, names in named_by_role.items() for name in names]:
        assert named[key]["status"] == "ok"
        assert named[key]["error"] is None
        assert named[key]["distribution"] == "kvpolicy"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_of_every_verb(kvpolicy, verb):
    result = kvpolicy(*verb.split(), "--help")
    assert (result.code, result.err) == (0, "")
    assert f"Usage: kvpolicy {verb or '[OPTIONS]'}" in result.out
    if verb:
        assert "--json" in result.out


# --- bad input


@pytest.mark.parametrize("verb", ["tune", "eval uniform", "estimate"])
@pytest.mark.parametrize("retention", ["0", "1.5", "-1", "nan", "inf"])
def test_a_retention_out_of_range(refused, verb, retention):
    assert f"got {retention}" in refused(*verb.split(), "--retention", retention)


def test_a_retention_of_1_has_nothing_to_search(refused, tune):
    assert "must lie in (0, 1), got 1 (1 keeps everything)" in refused(*tune, "--retention", "1")


WRONG_FOR_TUNE = {
    "--estimator cosin": "no estimator named 'cosin' (did you mean 'cosine'?)",
    "--allocator baklav": "no allocator named 'baklav' (did you mean 'baklava'?)",
    "--policy steaming": "no policy named 'steaming' (did you mean 'streaming'?)",
    "--model smolm2-135m": "did you mean 'smollm2-135m'?",
    "--model ./nowhere": "no model directory at './nowhere'",
    "--model nowhere.gguf": "no GGUF file at 'nowhere.gguf'",
    "--sampler cma": "--sampler must be tpe or gp, got 'cma'",
    "--device gpu": "no device is called 'gpu'",
    "--dtype int8": "dtype must be auto, float32, bfloat16 or float16, got 'int8'",
    "--context 63": "--context must be at least 64, got 63",
    "--trials 0": "Invalid value for '--trials'",
    "--trials many": "Invalid value for '--trials'",
    "--trails 3": "No such option: --trails",
    "--storage nosuch://x": "cannot open the study storage nosuch://x",
    "--text nowhere.txt": "cannot read the text nowhere.txt: No such file or directory",
    "--text .": "cannot read the text .: Is a directory",
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG_FOR_TUNE.items(), ids=WRONG_FOR_TUNE)
def test_a_wrong_option_of_tune(refused, tune, tmp_path, arguments, expected):
    assert expected in refused(*tune, *arguments.split())
    assert not list(tmp_path.glob("plan.json")), "nothing is written"


WRONG_ELSEWHERE = {
    "nosuch": "No such command 'nosuch'",
    "eval full --task vibes": "no task named 'vibes'; there is: perplexity",
    "eval uniform": "eval uniform needs --retention",
    "eval full --retention 0.3": "eval full keeps everything; leave --retention out",
    "eval full --context 0": "--context must be at least 16 tokens, got 0",
    "eval full --context -5": "--context must be at least 16 tokens, got -5",
    "eval full --context 64 --prefill 64": "--prefill must be below the context of 64",
    "eval nowhere.json": "plan file 'nowhere.json': cannot be read: No such file or directory",
    "show nowhere.json": "plan file 'nowhere.json': cannot be read: No such file or directory",
    "show .": "plan file '.': cannot be read: Is a directory",
    "show": "Missing argument 'plan'",
    "profile --estimator cosin": "did you mean 'cosine'?",
    "profile --context 0": "--context must be at least 16 tokens, got 0",
    "profile --param group": "--param expects NAME=VALUE, got 'group'",
    "profile --param grupp=max": "grupp",
    "profile --param group=all": "'group' is 'all', expected Literal['mean', 'max']",
    "estimate --dtype int4": "--dtype must be one of float32, bfloat16, float16, got 'int4'",
    "estimate --model smolm2-135m": "did you mean 'smollm2-135m'?",
    "estimate --batch 0": "Invalid value for '--batch'",
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG_ELSEWHERE.items(), ids=WRONG_ELSEWHERE)
def test_a_wrong_option_elsewhere(refused, arguments, expected):
    assert expected in refused(*arguments.split())


def test_a_wrong_option_in_a_process_of_its_own(tune):
    result = in_a_process(*tune, "--estimator", "cosin")
    assert (result.code, result.out, len(result.errors)) == (2, "", 1)
    assert result.err.splitlines() == result.errors, "nothing else is said"


def test_no_arguments_show_the_help(kvpolicy):
    result = kvpolicy()
    assert result.code == 2
    assert "Usage: kvpolicy" in result.out + result.err
    assert result.err.index("What to do first") > result.err.find("Usage: kvpolicy"), "not above what scrolls away"


@pytest.mark.parametrize("verb", ["tune", "eval", "profile"])
def test_a_text_shorter_than_needed(refused, tiny_checkpoint, tmp_path, verb):
    text = tmp_path / "short.txt"
    text.write_text(text_of(60, paragraph=10))
    plan = ["full"] if verb == "eval" else []
    out = ["--out", tmp_path / "plan.json"] if verb == "tune" else []
    line = refused(verb, *plan, "--model", tiny_checkpoint, "--text", text, "--context", "400", *out)
    advice = (
        "give a longer --text or a smaller --context" if verb == "tune" else "give a longer text or a shorter context"
    )
    assert "short.txt" in line and advice in line
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    "content", [b"", b"na\xefve words\n\nmore", b"two words"], ids=["empty", "latin-1", "two words"]
)
def test_a_text_that_is_no_text(refused, tune, tmp_path, content):
    (tmp_path / "bad.txt").write_bytes(content)
    assert "bad.txt" in refused(*tune, "--text", tmp_path / "bad.txt")


@pytest.mark.parametrize("verb", ["tune", "profile", "eval"])
def test_a_model_whose_attention_cannot_be_probed(refused, tiny_text, tmp_path, verb):
    falcon = save_tiny_falcon(tmp_path / "falcon")
    plan = ["full"] if verb == "eval" else []
    line = refused(verb, *plan, "--model", falcon, "--text", tiny_text, "--context", "64")
    assert "Falcon" in line


@pytest.mark.parametrize("damage", ["no config", "no weights", "torn weights", "config is no JSON", "no tokenizer"])
def test_a_damaged_checkpoint(refused, tune, tmp_path, damage):
    folder = save_tiny_checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config is no JSON":
        (folder / "config.json").write_text("{")
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    assert str(folder) in refused(*tune, "--model", folder)


def edited(change):
    def edit(text):
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return edit


def level(document):
    return document["levels"][0]


DAMAGES = {
    "empty": (lambda text: "", "the file is empty"),
    "truncated": (lambda text: text[: len(text) // 2], "not complete JSON at line"),
    "another format": (edited(lambda d: d.update(format="x")), "format is 'x'"),
    "another version": (edited(lambda d: d.update(version=2)), "version is 2, expected 1"),
    "no levels": (edited(lambda d: d.update(levels=[])), "levels is empty"),
    "negative share": (edited(lambda d: level(d)["shares"][1].__setitem__(0, -0.1)), "levels[0].shares[1][0]"),
    "NaN share": (edited(lambda d: level(d)["shares"][0].__setitem__(1, float("nan"))), "levels[0].shares"),
    "a share too few": (edited(lambda d: level(d)["shares"][0].pop()), "levels[0].shares"),
    "a text for a share": (edited(lambda d: level(d)["shares"][0].__setitem__(1, "a")), "levels[0].shares[0][1]"),
}


@pytest.mark.parametrize("verb", ["eval", "show"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan(refused, tuned, tmp_path, verb, damage):
    change, expected = DAMAGES[damage]
    path = tmp_path / "bad.json"
    path.write_text(change(tuned[0].read_text()))
    line = refused(verb, path)
    assert str(path) in line and expected in line


def test_a_plan_of_another_model_shape(refused, tuned, tiny_text, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other", layers=3)
    line = refused("eval", tuned[0], "--model", other, "--text", tiny_text)
    assert "made for another model" in line and "num_layers is 2 in the plan, 3 in the model" in line


def test_a_plan_of_another_configuration_of_the_shape_is_used_with_one_warning(kvpolicy, tuned, tiny_text, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["max_position_embeddings"] = 512
    (other / "config.json").write_text(json.dumps(config))
    result = kvpolicy("eval", tuned[0], "--model", other, "--text", tiny_text, "--json")
    assert result.code == 0
    assert len(result.warnings) == 1 and "another configuration" in result.warnings[0]


def test_a_retention_below_the_plan(refused, tuned, tiny_text):
    line = refused("eval", tuned[0], "--text", tiny_text, "--retention", "0.2")
    assert "retention 0.2 is below the plan's lowest level; it has 0.3, 0.5" in line


@pytest.mark.parametrize("target", ["no folder", "a folder", "a pipe", "a folder that is a file"])
@pytest.mark.parametrize("verb", ["tune", "profile", "show"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(refused, tune, tuned, tmp_path, verb, target):
    (tmp_path / "file").write_text("as it was")
    path = {"no folder": tmp_path / "no" / "x", "a folder": tmp_path / "x", "a pipe": tmp_path / "x"}.get(
        target, tmp_path / "file" / "x"
    )
    if target == "a folder":
        path.mkdir()
    elif target == "a pipe":
        os.mkfifo(path)
    before = sorted(tmp_path.rglob("*"))
    if verb == "show":
        line = refused("show", tuned[0], "--html", path)
    else:
        line = refused(*(tune if verb == "tune" else ["profile"]), "--out", path)
    assert f"cannot write {path}" in line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "as it was"
    assert target != "a pipe" or path.is_fifo()


def test_an_old_plan_survives_a_search_that_fails(refused, tune, tmp_path):
    (tmp_path / "plan.json").write_text("the old plan")
    refused(*tune, "--storage", "nosuch://x")
    assert (tmp_path / "plan.json").read_text() == "the old plan"


# --- broken plugins


@pytest.fixture
def broken_plugin(tmp_path):
    """An environment in which a distribution's plugin cannot be imported."""
    site = tmp_path / "site"
    info = site / "kvpolicy_sour-2.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpolicy-sour\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[kvpolicy]\nsour = kvpolicy_sour\n")
    (site / "kvpolicy_sour.py").write_text("raise ImportError('[/milk] is off')\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def test_a_broken_plugin_costs_one_warning_and_nothing_else(broken_plugin, tiny_checkpoint, tiny_text):
    arguments = ["profile", "--model", tiny_checkpoint, "--text", tiny_text, "--context", "64", "--json"]
    result = in_a_process(*arguments, env=broken_plugin)
    assert result.code == 0, result.err
    assert result.json["per_head"]
    assert len(result.warnings) == 1
    assert "'sour' of distribution 'kvpolicy-sour' 2.5 is left out" in result.warnings[0]
    assert "Traceback" not in result.err


@pytest.mark.parametrize("options", [["--json"], []])
def test_plugins_shows_who_is_broken_and_why(broken_plugin, options):
    result = in_a_process("plugins", *options, env={**broken_plugin, "COLUMNS": "200"})
    assert (result.code, result.err) == (0, "")
    if options:
        row = next(row for row in result.json if row["distribution"] == "kvpolicy-sour")
        assert row["status"] == "broken" and "[/milk] is off" in row["error"]
    else:
        assert "kvpolicy-sour 2.5" in result.out and "[/milk] is off" in result.out


# --- interruption


def stopped_in_the_search(arguments, number):
    """A search sent a signal when its second trial is done. Returns what it said and what the journal holds then."""
    process = subprocess.Popen(
        [*KVPOLICY, *map(str, arguments), "--trials", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if "trial 2/" in line:
            process.send_signal(number)
            break
    out, rest = process.communicate(timeout=60)
    return Result(process.returncode, out, "".join(said) + rest)


def finished_trials(plan):
    """Of the search that was begun first."""
    storage = open_storage(plan.with_name("plan.json.study"))
    trials = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    return sum(trial.state.name == "COMPLETE" for trial in trials)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_search_goes_on_after(kvpolicy, tune, tmp_path, number):
    plan = tmp_path / "plan.json"
    stopped = stopped_in_the_search(tune, number)
    assert "Traceback" not in stopped.err
    assert stopped.out == ""
    assert not plan.exists()
    if number == signal.SIGINT:
        assert stopped.code == 130
        assert f"the study is kept in {plan}.study: run the same command with --resume to go on" in stopped.err
        assert stopped.err.splitlines()[-1] == "kvpolicy: interrupted"
    done = finished_trials(plan)
    assert done >= 2
    again = kvpolicy(*tune, "--resume", "--trials", done + 2, "--json")
    assert again.code == 0, again.err
    assert finished_trials(plan) == done + 2
    assert load_plan(plan).provenance["trials"] == done + 2


def test_a_finished_search_blocks_no_other_and_is_gone_on_with_by_its_settings(kvpolicy, tune, tmp_path):
    for options in ([], [], ["--seed", "1"]):
        again = kvpolicy(*tune, *options)
        assert again.code == 0, again.err
    assert "a new search is begun; an earlier one is kept" in again.err and "--resume goes on with it" in again.err
    storage = open_storage(tmp_path / "plan.json.study")
    assert len(storage.get_all_studies()) == 3
    assert kvpolicy(*tune, "--resume").code == 0
    assert len(open_storage(tmp_path / "plan.json.study").get_all_studies()) == 3


def test_resume_with_another_seed_says_what_differs(kvpolicy, refused, tune):
    assert kvpolicy(*tune).code == 0
    assert "(seed was 0, now 7)" in refused(*tune, "--resume", "--seed", "7")
