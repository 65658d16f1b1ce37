"""What reaches the terminal: nothing of a file or a plugin that a terminal would obey, and the words of a shell."""

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress as Bars

from kvpolicy.cli import watch
from kvpolicy.cli.terminal import Console, shell_line
from kvpolicy.cli.watch import _BarProgress, _LineProgress, duration
from kvpolicy.files.plain import plain

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TITLE = "\x1b]0;owned\x07\x9b31m\u202e[link=http://x]l[/link]"


@pytest.fixture
def hostile(tuned, tmp_path):
    """A plan whose texts would set the window's title."""
    plan = json.loads(tuned[0].read_text())
    plan["model"] |= {"id": TITLE, "revision": TITLE}
    plan["method"]["policy"] |= {"name": TITLE}
    plan["method"]["allocator"]["params"] = {TITLE: TITLE}
    plan["provenance"] |= {"objective": TITLE, TITLE: TITLE}
    for level in plan["levels"]:
        level["comparison"]["verdict"] = TITLE
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(plan))
    return path


def test_show_hands_no_escape_of_a_plan_on(kvpolicy, hostile, tmp_path):
    shown = kvpolicy("show", hostile, "--html", tmp_path / "x.html", "--png", tmp_path / "x.png")
    assert shown.code == 0
    assert shown.err.splitlines() == shown.warnings and "\x1b" not in shown.err
    assert "owned" in shown.out and "[link=http://x]" in shown.out
    assert not OBEYED.search(shown.out)
    assert not OBEYED.search(kvpolicy("show", hostile, "--json").out)


def test_an_error_hands_no_escape_on(refused, hostile, tiny_checkpoint):
    line = refused("generate", hostile, "--model", tiny_checkpoint, "--retention", "0.5", "--prompt", "x")
    assert "owned" in line and not OBEYED.search(line)


def test_text_is_kept_but_for_what_is_obeyed():
    assert plain("Größe\tein\n文 👩‍💻") == "Größe\tein\n文 👩‍💻"
    assert plain("a\x1b[31mb\x00\r\x85\udc80") == "a\ufffd[31mb" + 4 * "\ufffd"


def test_rich_styles_are_left_and_its_markup_is_not_read(capsys):
    Console().print("[red]x[/red] [/nope]")
    assert capsys.readouterr().out == "[red]x[/red] [/nope]\n"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("leave out resume=True to begin", "leave out --resume to begin"),
        ("no retention keeps within max_loss=0.02: with", "no retention keeps within --max-loss 0.02: with"),
        ("say which with retention= or tokens=", "say which with --retention or --tokens"),
        ("streaming (num_sink_tokens=4)", "streaming (num_sink_tokens=4)"),
        ("two\n  lines", "two lines"),
    ],
)
def test_messages_speak_the_language_of_the_shell(message, line):
    assert shell_line(message) == line


def test_nothing_in_the_command_line_goes_to_the_terminal_another_way():
    folder = Path(__file__).parents[1] / "kvpolicy" / "cli"
    for path in set(folder.glob("*.py")) - {folder / "terminal.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "rich.console"), path
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path


def test_a_bar_fits_80_columns_and_says_what_is_left():
    clock = [0.0]
    console = Console()
    console.size = (80, 25)
    bars = Bars(*_BarProgress(console)._columns, console=console, get_time=lambda: clock[0], auto_refresh=False)
    bars.add_task("search 30%", total=40, detail="best -0.0857 against uniform")
    for _ in range(4):
        clock[0] += 20
        bars.update(bars.task_ids[0], advance=1)
    with console.capture() as capture:
        console.print(bars)
    (line,) = capture.get().splitlines()
    assert "4/40" in line and "80 s, 12 min left" in line and "best -0.0857 against uniform" in line
    assert len(line) <= 80


def test_lines_say_once_a_minute_how_far_a_stage_is(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    lines = _LineProgress(Console(stderr=True))
    lines.begin("evaluate", 40)
    for detail in ["", "", "", "snapkv, 0.5 kept", "", ""]:
        clock[0] += 25
        lines.advance(detail)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 3 of 40, about 15 min left (75 s)",
        "evaluate: snapkv, 0.5 kept (100 s)",
    ]


def test_durations_are_those_that_people_say():
    assert [duration(x) for x in (0.2, 25, 99, 240, 4800)] == ["0 s", "25 s", "99 s", "4 min", "80 min"]
    assert duration(2 * 3600 + 60) == "2 h 1 min"


@pytest.mark.parametrize("arguments", [["plugins"], ["show", "PLAN"], ["estimate", "--model", "MODEL"]])
def test_what_is_shown_fits_80_columns(kvpolicy, tuned, tiny_checkpoint, arguments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = {"PLAN": tuned[0], "MODEL": tiny_checkpoint}
    shown = kvpolicy(*(names.get(argument, argument) for argument in arguments))
    assert shown.code == 0 and "…" not in shown.out
    tables = [line for line in shown.out.splitlines() if ": " not in line]  # sentences are the terminal's to break
    assert max(map(len, tables)) <= 80


@pytest.mark.parametrize("verb", ["tune", "eval", "compare", "profile"])
def test_paragraphs_of_a_help_use_the_width_of_the_terminal(kvpolicy, verb, monkeypatch):
    """And not that of the source."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in kvpolicy(verb, "--help").out.split("╭")[0].splitlines()]
    for line, after in itertools.pairwise(lines):
        assert not line or not after or len(f"{line} {after.split()[0]}") > 78, line


RUN = ["--context", "160", "--new-tokens", "2", "--repeats", "1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "full", "--context", "64"],
        ["bench", "full", *RUN],
        ["profile", "--context", "64"],
        ["generate", "full"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_verb_that_loads_a_model_says_so_before_it_is_there(kvpolicy, tiny_checkpoint, tiny_text, arguments):
    text = ["--prompt", "gidu", "--max-new-tokens", "2"] if arguments[0] == "generate" else ["--text", tiny_text]
    said = kvpolicy(*arguments, *text, "--model", tiny_checkpoint, "--device", "cpu")
    assert said.code == 0 and said.err.splitlines()[0] == f"loading {tiny_checkpoint}", said.err


def test_a_terminal_sees_that_something_goes_on(monkeypatch, capsys):
    """A line that turns while nobody can count, and is gone behind it; elsewhere the line stays."""
    with _LineProgress(Console(stderr=True)).wait("loading a-model"):
        assert capsys.readouterr().err == "loading a-model\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with _BarProgress(Console(stderr=True)).wait("loading a-model"):
        pass
    shown = capsys.readouterr().err
    assert "loading a-model" in shown
    assert shown.endswith("\x1b[2K"), "the line is taken away"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "PLAN"], ["loading torch"]),
        (["validate", "PLAN"], ["loading torch", "checking PLAN"]),
        (["pull", "FOLDER", "--out", "OUT"], ["loading torch", "pulling the plan of FOLDER"]),
    ],
    ids=lambda value: value[0],
)
def test_a_terminal_sees_a_line_turn_before_there_is_anything_to_say(
    kvpolicy, tuned, tmp_path, monkeypatch, arguments, said
):
    """Torch takes seconds to load. Without a terminal nothing is said."""
    names = {"PLAN": str(tuned[0]), "FOLDER": str(tuned[0].parent), "OUT": str(tmp_path / "out.json")}
    run = [names.get(argument, argument) for argument in arguments]
    assert kvpolicy(*run).err.splitlines() == kvpolicy(*run).warnings
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    shown = kvpolicy(*run).err
    places = [shown.find(re.sub("PLAN|FOLDER", lambda name: names[name[0]], line)) for line in said]
    assert places == sorted(places) and places[0] >= 0, shown


def test_a_terminal_sees_that_a_prompt_is_read_and_no_more_once_there_is_an_answer(
    kvpolicy, tiny_checkpoint, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run = ["generate", "full", "--model", tiny_checkpoint, "--device", "cpu", "--prompt", "gidu bada", "--no-chat"]
    said = kvpolicy(*run, "--max-new-tokens", "2").err
    reading = said.rindex("tokens of prompt"), said.rindex("reading"), said.rindex("\x1b[2K"), said.rindex("more token")
    assert list(reading) == sorted(reading), said


def test_a_terminal_sees_a_line_turn_while_a_search_times_a_forward(
    kvpolicy, tiny_checkpoint, tiny_text, tmp_path, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run = ["--model", tiny_checkpoint, "--text", tiny_text, "--device", "cpu", "--context", "64", "-r", "0.5"]
    said = kvpolicy("tune", *run, "--trials", "1", "--out", tmp_path / "plan.json").err
    turning = "[\u2800-\u28ff]\x1b\\[0m "
    assert re.search(f"{turning}timing a forward to say what the search will cost", said), said


def test_the_shell_comes_back_without_a_search_for_garbage():
    """It took two seconds where transformers was loaded."""
    script = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
    script += "from kvpolicy.cli import main; main()"  # what is registered first runs last
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("True\n"), done
