"""--config: options from a file, the command line on top, and a run that is repeated from its own output."""

import json
import os
import subprocess
import tomllib

import pytest

from tests.command_line import KVPOLICY

ESTIMATE = ["estimate", "--device", "cpu", "--json"]


@pytest.fixture
def options(tmp_path):
    def write(text):
        path = tmp_path / "options.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_options_come_from_the_file_and_the_command_line_goes_first(kvpolicy, options, tiny_checkpoint):
    path = options(f"model = {json.dumps(str(tiny_checkpoint))}\ncontext = 2000\nretention = [0.5, 0.25]\nbatch = 3")
    rows = kvpolicy(*ESTIMATE, "--config", path).json
    assert [(row["context_length"], row["batch_size"], row["retention"]) for row in rows] == [
        (2000, 3, 0.5),
        (2000, 3, 0.25),
    ]
    row = kvpolicy(*ESTIMATE, "--config", path, "--context", "1000", "-r", "0.7").json
    assert (row["context_length"], row["batch_size"], row["retention"]) == (1000, 3, 0.7)


def test_a_yaml_file_says_the_same(kvpolicy, tiny_checkpoint, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"estimate:\n  model: {json.dumps(str(tiny_checkpoint))}\n  retention: [0.5, 0.25]\n  batch: 3\n")
    rows = kvpolicy(*ESTIMATE, "--config", path).json
    assert [(row["batch_size"], row["retention"]) for row in rows] == [(3, 0.5), (3, 0.25)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contxt: 3", "estimate has no option 'contxt'; it has batch, context,"),
        ("on: 3", "estimate has no option 'True'"),
        ("context: [1,\n  2", "cannot read the options in"),
        ("- 3", "expected lines of 'option: value', got list"),
        ("", "expected lines of 'option: value', got NoneType"),
        ("a: " + 9999 * "[", "cannot read the options in"),
        ("a: !!python/name:os.system", "cannot read the options in"),
        ("a: 2026-13-45", "cannot read the options in"),
    ],
)
def test_a_yaml_file_that_cannot_be_meant_is_one_line(refused, tmp_path, text, said):
    path = tmp_path / "options.yml"
    path.write_text(text)
    assert said in refused("estimate", "--config", path)


def test_one_file_serves_several_verbs(kvpolicy, options, tiny_checkpoint):
    path = options(f"[tune]\ntrials = 3\n[estimate]\nmodel = {json.dumps(str(tiny_checkpoint))}\nretention = 0.5")
    assert kvpolicy(*ESTIMATE, "--config", path).json["retention"] == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contxt = 3", "estimate has no option 'contxt'; it has batch, context,"),
        ("json = true", "estimate has no option 'json'"),
        ("[tune]\ntrials = 3", "has options of tune and none of estimate: expected [estimate]"),
        ("context = ", "cannot read the options in"),
        ("context = 'many'", "--context"),
        ("context = 0", "--context"),
        ("a = " + 9999 * "[", "cannot read the options in"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_line(refused, options, text, said):
    assert said in refused("estimate", "--config", options(text))


def test_a_file_that_is_not_there_is_one_line(refused, tmp_path):
    assert "cannot read the options in" in refused("estimate", "--config", tmp_path / "none.toml")
    os.mkfifo(tmp_path / "pipe")
    assert "cannot read the options in" in refused("estimate", "--config", tmp_path / "pipe")


def test_a_table_is_parameters(kvpolicy, options, tiny_checkpoint, tiny_text, tmp_path):
    about = {"model": str(tiny_checkpoint), "text": str(tiny_text), "context": 64}
    head = "\n".join(f"{name} = {json.dumps(value)}" for name, value in about.items())
    path = options(f'{head}\n[param]\nhead_input = "slice"')
    assert kvpolicy("profile", "--config", path, "--json").json["estimator"]["params"]["head_input"] == "slice"


def test_a_search_is_repeated_from_its_own_output(kvpolicy, tuned, tmp_path):
    plan = tuned[0]
    beside = plan.with_name("plan.json.toml")
    said = tomllib.loads(beside.read_text(encoding="utf-8"))["tune"]
    assert (said["trials"], said["retention"], said["out"]) == (3, [0.5, 0.3], str(plan))
    again = kvpolicy("tune", "--config", beside, "--out", tmp_path / "again.json", "--json")
    assert again.code == 0, again.err
    assert again.json["levels"] == tuned[1].json["levels"]
    assert (tmp_path / "again.json.toml").exists()


def test_every_text_of_an_option_comes_back(kvpolicy, tiny_checkpoint, tiny_text, tmp_path):
    out = tmp_path / 'a "quoted"\\ 文👩‍💻 \x7f name.json'
    run = ["profile", "--model", tiny_checkpoint, "--text", tiny_text, "--context", "64"]
    first = kvpolicy(*run, "--out", out)
    assert first.code == 0, first.err
    before, beside = out.read_bytes(), tmp_path / f"{out.name}.toml"
    assert tomllib.loads(beside.read_text(encoding="utf-8"))["profile"]["out"] == str(out)
    out.unlink()
    assert kvpolicy("profile", "--config", beside).code == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_and_options(shell):
    def complete(line, index):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(index), "_TYPER_COMPLETE_ARGS": line}
        env = (
            os.environ | words | {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_KVPOLICY_COMPLETE": f"complete_{shell}"}
        )
        return subprocess.run(KVPOLICY, env=env, capture_output=True, text=True).stdout

    assert "validate" in complete("kvpolicy val", 1)
    assert "--policy-param" in complete("kvpolicy tune --pol", 2)
    env = os.environ | {"_KVPOLICY_COMPLETE": f"source_{shell}"}  # --show-completion is for the shell it is typed into
    script = subprocess.run(KVPOLICY, env=env, capture_output=True, text=True)
    assert script.returncode == 0 and "_KVPOLICY_COMPLETE" in script.stdout, script.stderr
