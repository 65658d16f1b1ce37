"""The verbs as functions: parameters and JSON of the command line, no printing, and arguments in the messages."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import kvpolicy as package
from kvpolicy.cli import app
from kvpolicy.integrations.transformers.probes import layer_sharing
from kvpolicy.progress import Progress

VERBS = {command.name: command.callback for command in app.registered_commands}
TWINS = ("bench", "compare", "estimate", "eval", "profile")
OF_A_SHELL = {"config", "json", "quiet", "more"}  # `more` are further --methods
SMALL = {"context": 64, "dtype": "float32"}


@pytest.mark.parametrize("verb", TWINS)
def test_parameters_and_defaults_are_those_of_the_verb(verb):
    options = {
        name: each.default for name, each in inspect.signature(VERBS[verb]).parameters.items() if name not in OF_A_SHELL
    }
    arguments = {name: each.default for name, each in inspect.signature(getattr(package, verb)).parameters.items()}
    assert arguments.pop("progress", None) is None
    if verb == "compare":
        assert arguments.pop("methods") is inspect.Parameter.empty and options.pop("methods") is None
        assert str(options.pop("out")) == arguments.pop("out")
    assert arguments == options


@pytest.fixture
def both(kvpolicy, tiny_checkpoint, tiny_text, capfd):
    """both(verb, *positional, text=True, **arguments): what the function and the verb say, as JSON."""

    def call(verb, *positional, text=True, **arguments):
        arguments |= SMALL | ({"text": tiny_text} if text else {})
        given = {"model": tiny_checkpoint} | arguments
        capfd.readouterr()
        answer = getattr(package, verb)(*positional, **given)
        assert capfd.readouterr() == ("", ""), "a function prints nothing"
        options = []
        for name, value in given.items():
            for each in value if isinstance(value, list) else [value]:
                option = f"--{name.replace('_', '-')}"
                if isinstance(each, dict):
                    options += [part for key, x in each.items() for part in (option, f"{key}={json.dumps(x)}")]
                else:
                    options += [option] if each is True else [option, each]
        return answer.to_json(), kvpolicy(verb, *positional, *options, "--json").json

    return call


def test_eval_says_what_the_verb_says(both, tuned):
    ours, printed = both("eval", "uniform", retention=0.5, policy="tova", limit=2, prefill=32)
    assert ours == printed and ours["plan"] == "uniform" and ours["full"]["n"] == 2
    ours, printed = both("eval", str(tuned[0]), policy_param={"num_sink_tokens": 4})
    assert ours == printed and [row["retention"] for row in ours] == [0.5, 0.3]


def test_estimate_says_what_the_verb_says(both):
    for retention in (0.3, [0.5, 0.1]):
        ours, printed = both("estimate", text=False, retention=retention, policy="snapkv", device="cpu")
        assert ours == printed
    assert [row["retention"] for row in ours] == [0.5, 0.1]


@pytest.mark.parametrize("more", [{"param": {"group": "max"}}, {"agreement": True, "estimator": ["cosine", "entropy"]}])
def test_profile_says_what_the_verb_says(both, tmp_path, more):
    out, png = tmp_path / "profile.json", tmp_path / "profile.png"
    ours, printed = both("profile", out=out, png=png, **more)
    assert ours == printed == json.loads(out.read_text())
    assert png.read_bytes().startswith(b"\x89PNG")


def test_profile_of_layers_that_share(both, tmp_path):
    out = tmp_path / "sharing.json"
    ours, printed = both("profile", sharing=1, most_similar=True, out=out)
    assert ours == printed == json.loads(out.read_text())
    assert ours["order"] == "most similar first" and ours["shared_layers"] in ([], [[1, 0]])
    assert len(ours["similarity"]) == len(ours["shared_layers"]) and ours["pairs_tried"] == 1


def test_a_plan_is_written_with_layers_that_share(kvpolicy, tiny_checkpoint, tiny_text, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_sharing, "THRESHOLD", -2.0)
    out = tmp_path / "shared.json"
    command = ["profile", "--sharing", 1, "--plan", tuned[0], "--model", tiny_checkpoint, "--text", tiny_text]
    assert kvpolicy(*command, "--out", out, "--json").json["shared_layers"] == [[1, 0]]
    plan, before = package.load_plan(out), package.load_plan(tuned[0])
    assert plan.shared_layers == {1: 0} and plan.retentions == before.retentions
    monkeypatch.setattr(layer_sharing, "THRESHOLD", 2.0)
    said = kvpolicy(*command, "--out", tmp_path / "none.json")
    assert said.code == 2 and "none of 1 pairs of layers may share, so there is no plan to write" in said.err
    assert not (tmp_path / "none.json").exists()


def test_compare_says_what_the_verb_says(both, tmp_path):
    out = tmp_path / "c.json"
    ours, printed = both("compare", "tova", retention=0.5, limit=2, out=out)
    assert ours == printed, "the verb measures nothing again"
    assert [row["method"] for row in ours["rows"]] == ["full", "random/uniform", "tova/uniform"]
    assert out.with_suffix(".md").is_file()


def test_bench_says_what_the_verb_says_but_for_the_times(both):
    ours, printed = both("bench", "uniform", retention=[0.5, 0.25], new_tokens=2, repeats=1, min_tokens=8)
    for one, other in zip([ours["dense"], *ours["caches"]], [printed["dense"], *printed["caches"]], strict=True):
        assert list(one) == list(other)
        times = [name for name in one if "ms_" in name or name.endswith(("seconds", "token_ratio"))]
        assert len(times) == 5 and all(one.pop(name) and other.pop(name) for name in times)
        one.pop("peak_bytes"), other.pop("peak_bytes")
    assert ours == printed


def test_a_method_that_fails_is_in_the_answer(tiny_checkpoint, tiny_text, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no luck today")

    monkeypatch.setattr(package.registry.get("policy", "h2o"), "score_prompt", broken)
    options = {"retention": 0.5, "limit": 2, "no_timing": True, "out": tmp_path / "c.json"}
    answer = package.compare(["streaming", "h2o"], model=tiny_checkpoint, text=tiny_text, **options, **SMALL)
    assert [(row.method, row.retention) for row in answer.failed] == [("h2o/uniform", 0.5)]
    assert "no luck today" in answer.failed[0].error


def test_progress_is_told_to_who_asks(tiny_checkpoint, tiny_text):
    class Stages(Progress):
        def __init__(self):
            self.begun = []

        def begin(self, stage, total):
            self.begun.append((stage, total))

    stages = Stages()
    package.eval("uniform", retention=0.5, model=tiny_checkpoint, text=tiny_text, progress=stages, **SMALL)
    assert stages.begun == [("evaluate", 2)]


NO_MODEL = {"model": "no/such/model"}  # loading it would be another error
WRONG = [
    ("eval", ["uniform"], {}, "eval uniform needs retention="),
    ("eval", ["full"], {"retention": 0.5}, "leave retention= out"),
    ("eval", ["full"], {"context": 64, "prefill": 64}, "prefill= must be below the context of 64 tokens, got 64"),
    ("eval", ["full"], {"limit": 0}, "limit= must be at least 1, got 0"),
    ("eval", ["full"], {"dtype": "int8"}, "dtype= must be auto, float32, bfloat16 or float16, got 'int8'"),
    ("bench", [], {"retention": 0}, "retention= is the fraction that is kept"),
    ("bench", [], {"repeats": 0}, "repeats= must be at least 1, got 0"),
    ("bench", ["full"], {"allocator": "pyramid"}, "allocator= goes with uniform"),
    ("estimate", [], {"context": 0}, "context= must be at least 1, got 0"),
    ("profile", [], {"estimator": ["cosine", "entropy"]}, "estimator= was given 2 times: only agreement=True takes"),
    ("profile", [], {"most_similar": True}, "most_similar=True is the order in which sharing= looks for layers"),
    ("profile", [], {"sharing": 1, "estimator": "entropy"}, "sharing= looks for layers alone"),
    ("profile", [], {"sharing": 1, "plan": "x.json"}, "plan= is a plan that is written to out= with the layers that"),
    ("profile", [], {"token_map": "x.png", "estimator": "entropy"}, "token_map=: the estimator 'entropy'"),
    ("compare", ["snapkv"], {"prefill": 0}, "prefill=0 decodes from the first token on"),
    ("compare", ["tova"], {"limit": 1}, "limit= must be at least 2, got 1"),
    ("compare", ["tova"], {"part": "search"}, "part= must be heldout or whole, got 'search'"),
    ("compare", [[]], {}, "name the methods to compare"),
]


@pytest.mark.parametrize(("verb", "positional", "arguments", "said"), WRONG)
def test_errors_name_arguments_before_a_model_is_loaded(tmp_path, monkeypatch, verb, positional, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(package.KVPolicyError) as caught:
        getattr(package, verb)(*positional, **NO_MODEL, **arguments)
    assert said in str(caught.value) and "--" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def messages(path):
    """The strings of a file that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told)
    return [node.value for node in constants if isinstance(node.value, str)]


def test_only_the_command_line_names_its_options():
    folder = Path(package.__file__).parent
    pages = {"plan_card.py"}  # what it writes is a page, with the commands that follow
    files = [path for path in folder.rglob("*.py") if path.parent.name != "cli" and path.name not in pages]
    assert [(path.name, text) for path in files for text in messages(path) if re.search(r"--[a-z]", text)] == []
    assert any("--" in text for path in (folder / "cli").glob("*.py") for text in messages(path))
