"""What reaches the terminal: nothing of a file or a plugin that a terminal would obey, and the words of a shell."""

import ast
import json
import re
from pathlib import Path

import pytest

from kvpolicy.cli.terminal import Console, shell_line
from kvpolicy.report.plain import plain

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
