"""Options that every verb has, refusals that need no model, and what the messages call things."""

import importlib
import sys

import pytest

import kvpolicy as package
from kvpolicy import load_plan
from kvpolicy.cli import app, options, terminal
from kvpolicy.measure import machine
from tests.command_line import FAST

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]
MISSING = ["--model", "no/such/model"]  # loading it would be another error


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_h_is_help(kvpolicy, verb):
    short, long = (kvpolicy(*filter(None, [verb, option])) for option in ("-h", "--help"))
    assert short.code == long.code == 0
    assert short.out == long.out and "Usage: kvpolicy" in short.out


def test_version_is_the_distributions(kvpolicy):
    result = kvpolicy("--version")
    assert (result.code, result.out) == (0, f"kvpolicy {package.__version__}\n")


@pytest.mark.parametrize("verb", ["tune", "eval", "generate", "bench"])
def test_policy_param_is_checked_before_a_model_is_loaded(refused, verb):
    plan = [] if verb == "tune" else ["uniform", "-r", "0.5"]
    prompt = ["--prompt", "a"] if verb == "generate" else []
    line = refused(verb, *plan, *prompt, *MISSING, "--policy", "snapkv", "--policy-param", "window=3")
    assert "window" in line and "no/such/model" not in line
    assert "--policy-param expects NAME=VALUE" in refused(verb, *plan, *prompt, *MISSING, "--policy-param", "window")


def test_policy_param_reaches_the_cache(kvpolicy, tiny_checkpoint, tiny_text):
    options = ["uniform", "-r", "0.2", "--model", tiny_checkpoint, "--text", tiny_text, *FAST, "--json"]
    few, many = (
        kvpolicy("eval", *options, "--policy-param", f"num_sink_tokens={sinks}").json["perplexity"] for sinks in (1, 9)
    )
    assert few != many
    assert kvpolicy("eval", *options).json["perplexity"] == pytest.approx(
        kvpolicy("eval", *options, "--policy-param", "num_sink_tokens=4").json["perplexity"]
    )


def test_policy_param_goes_over_the_plans_own(kvpolicy, tuned, tiny_text):
    options = ["-r", "0.3", "--text", tiny_text, *FAST, "--json"]
    same = kvpolicy("eval", tuned[0], *options, "--policy-param", "num_sink_tokens=4")
    assert same.warnings == []
    other = kvpolicy("eval", tuned[0], *options, "--policy-param", "num_sink_tokens=2")
    assert "was tuned for the policy 'streaming'" in other.warnings[0]
    assert other.json["perplexity"] != same.json["perplexity"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("give tokens= to scale the lowest level", "give --tokens to scale the lowest level"),
        ("both retention=0.3 and tokens=5 were given", "both --retention 0.3 and --tokens 5 were given"),
        ("context_length must be at least 64, got 3", "--context must be at least 64, got 3"),
        ("call it again with resume=True.", "call it again with --resume."),
        ("policy_params has window", "--policy-param has window"),
        ("plan.json: provenance.context_length is 3", "plan.json: provenance.context_length is 3"),
        ("keep the tokens and the policy", "keep the tokens and the policy"),
    ],
)
def test_errors_name_options_and_not_arguments(said, shown):
    assert terminal.shell_line(said) == shown


def test_no_error_of_a_search_names_an_argument_of_python(refused, tmp_path):
    out = ["--out", tmp_path / "plan.json"]
    assert "--context must be at least 64, got 3" in refused("tune", *MISSING, *out, "--context", "3")
    assert "--prefill must be below the context of 64" in refused(
        "tune", *MISSING, *out, "--context", "64", "--prefill", "64"
    )
    assert "--max-loss is a part of" in refused("tune", *MISSING, *out, "--max-loss", "0")


@pytest.mark.parametrize("verb", ["eval", "generate", "bench", "compare"])
def test_a_level_below_the_plans_is_refused_before_a_model_is_loaded(refused, tuned, verb, tmp_path):
    more = {"generate": ["--prompt", "a"], "compare": ["--out", tmp_path / "c.json"]}.get(verb, [])
    line = refused(verb, tuned[0], "-r", "0.1", *MISSING, *more)
    assert "0.3, 0.5" in line and "no/such/model" not in line
    assert ("--tokens" in line) == (verb == "generate"), "the one verb that has it"
    assert "tokens=" not in line


REFUSED = {
    "compare streaming/baklava": "streaming/baklava: the allocator needs importance",
    "compare snapkv/power h2o": "snapkv/power: the allocator needs importance",
    "compare snapkv --prefill 0": "snapkv/uniform: --prefill 0 decodes from the first token on",
    "compare snapkv/nobody": "nobody",
    "compare streaming --dtype int8": "--dtype must be",
    "compare streaming --text none.txt": "cannot read the text none.txt: No such file",
    "eval uniform -r 0.5 --text none.txt": "cannot read the text none.txt: No such file",
    "bench uniform --text none.txt": "cannot read the text none.txt: No such file",
    "bench uniform --allocator baklava": "the allocator 'baklava' needs importance",
    "profile --text none.txt": "cannot read the text none.txt: No such file",
    "tune --text none.txt": "cannot read the text none.txt: No such file",
    "tune --param nothing=1": "nothing",
    "tune --allocator adakv": "splits the budget at run time",
    "generate uniform -r 0.5 --prompt a --allocator power": "the allocator 'power' needs importance",
}


@pytest.mark.parametrize(("arguments", "expected"), REFUSED.items(), ids=REFUSED)
def test_what_needs_no_model_is_refused_before_one_is_loaded(refused, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*arguments.split(), *MISSING)


def test_compare_ends_with_2_where_a_requested_row_failed_and_writes_the_table(
    kvpolicy, tiny_checkpoint, tiny_text, tmp_path, monkeypatch
):
    def broken(*_, **__):
        raise RuntimeError("no luck today")

    monkeypatch.setattr(package.registry.get("policy", "h2o"), "score_prompt", broken)
    fast = ["--model", tiny_checkpoint, "--text", tiny_text, *FAST, "-r", "0.5", "--limit", "2", "--no-timing"]
    out = tmp_path / "compare.json"
    good = kvpolicy("compare", "streaming", *fast, "--out", out)
    assert (good.code, good.errors) == (0, [])
    bad = kvpolicy("compare", "streaming", "h2o", *fast, "--out", out)
    assert bad.code == 2
    assert len(bad.errors) == 1 and "h2o/uniform at 0.5" in bad.errors[0] and "streaming" not in bad.errors[0]
    assert "no luck today" in out.with_suffix(".md").read_text()
    shown = kvpolicy("compare", "h2o", *fast, "--out", out, "--json")
    assert shown.code == 2 and shown.json["rows"], "what was measured is printed all the same"
    again = kvpolicy("compare", "streaming", *fast, "--out", out)
    assert again.code == 0, "the row that failed was not asked for"


def test_eval_measures_full_and_uniform_beside_a_plan(kvpolicy, tuned, tiny_text, monkeypatch):
    run = ["--text", tiny_text, "--dtype", "float32"]
    path, levels = tuned[0], load_plan(tuned[0]).levels
    for row, level in zip(kvpolicy("eval", path, *run, "--json").json, levels, strict=True):
        assert row["plan"] == str(path)
        assert row["full"]["perplexity"] == pytest.approx(level.perplexity["heldout_full"], rel=1e-6)
        assert row["uniform"]["perplexity"] == pytest.approx(level.perplexity["heldout_uniform"], rel=1e-6)
        assert row["uniform"]["entries"] == row["entries"] < row["full"]["entries"]
        assert {"task", "retention", "bytes", "dense_bytes", "n", "perplexity"} <= row["uniform"].keys()
    monkeypatch.setenv("COLUMNS", "200")  # a path is long, and a narrow table names its rows again
    shown = [line.split(" ")[0] for line in kvpolicy("eval", path, "-r", "0.3", *run).out.splitlines()]
    assert [name for name in shown if name in ("full", "uniform")] == ["full", "uniform"]
    alone = kvpolicy("eval", "full", "--model", load_plan(path).model.id, *run, *FAST[:2], "--json").json
    assert not alone.keys() & {"full", "uniform"}


def test_eval_takes_the_dtype_that_a_plan_was_tuned_in(kvpolicy, tiny_checkpoint, tiny_text, tmp_path):
    """So it gives the perplexity that tune reported, in bf16 too."""
    out = tmp_path / "plan.json"
    small = ["--model", tiny_checkpoint, "--text", tiny_text, "--context", "64", "--trials", "2", "-r", "0.5"]
    assert kvpolicy("tune", *small, "--dtype", "bfloat16", "--out", out).code == 0
    plan = load_plan(out)
    assert plan.provenance["dtype"] == "bfloat16"
    row = kvpolicy("eval", out, "--text", tiny_text, "--json").json
    assert row["dtype"] == "bfloat16"
    assert row["perplexity"] == pytest.approx(plan.levels[0].perplexity["heldout"], rel=1e-6)
    asked = kvpolicy("eval", out, "--text", tiny_text, "--dtype", "float32", "--json").json
    assert asked["dtype"] == "float32" and asked["perplexity"] != row["perplexity"]


@pytest.mark.parametrize(("memory", "fits"), [(10**6, False), (10**10, True), (None, None)])
def test_estimate_says_whether_it_fits(kvpolicy, tiny_checkpoint, monkeypatch, memory, fits):
    monkeypatch.setattr(importlib.import_module("kvpolicy.verbs.estimate"), "memory_bytes", lambda device: memory)
    run = ["estimate", "--model", tiny_checkpoint, "--context", "2000", "--batch", "9", "-r", "0.5", "--device", "cpu"]
    row = kvpolicy(*run, "--json").json
    assert row["weights_bytes"] + row["prefill_peak_bytes"] > 10**6
    assert (row["fits"], row["device_bytes"]) == (fits, memory)
    shown = kvpolicy(*run).out
    assert ("does not fit" in shown, "fits" in shown) == (fits is False, fits is not None)


def test_the_memory_of_this_machine_is_what_the_system_says():
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) for line in file if line.startswith("MemTotal:"))
    assert machine.memory_bytes("cpu") == pytest.approx(1024 * total, rel=0.01)


@pytest.mark.parametrize(
    ("started", "on_path", "expected"),
    [
        ("venv/bin/kvpolicy", False, "venv/bin/kvpolicy"),
        ("venv/bin/kvpolicy", True, "kvpolicy"),
        ("a folder/kvpolicy", False, "'a folder/kvpolicy'"),
        ("-c", True, "kvpolicy"),
    ],
)
def test_the_next_command_is_one_that_works_here(tmp_path, monkeypatch, started, on_path, expected):
    monkeypatch.chdir(tmp_path)
    if started != "-c":
        path = tmp_path / started
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str((tmp_path / started).parent) if on_path else str(tmp_path))
    monkeypatch.setattr(sys, "argv", [started])
    assert options.program() == expected


def test_tune_speaks_before_it_loads_the_model(kvpolicy, tmp_path):
    result = kvpolicy("tune", *MISSING, "--out", tmp_path / "plan.json")
    assert result.code == 2
    assert result.err.splitlines()[0] == "loading no/such/model"
