"""Every command of kvpolicy that a page shows can be typed: its verb, its options, as many arguments as it takes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from kvpolicy.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("plans/**/*.md"), *ROOT.glob("docs/**/*.md")]
ROOT_OPTIONS = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
VERBS = get_command(app).commands


def commands():
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("$ kvpolicy ", "> kvpolicy ")):
                    yield page.relative_to(ROOT).as_posix(), line[2:]


def problems(command):
    words = shlex.split(command.split(" | ")[0].split(" > ")[0].split(" && ")[0], comments=True)[1:]
    if words[0] in ROOT_OPTIONS:
        return []
    if words[0] not in VERBS:
        return [f"there is no verb {words[0]}"]
    known = {name: param for param in VERBS[words[0]].params for name in (*param.opts, *param.secondary_opts)}
    found, arguments, index = [], 0, 1
    while index < len(words):
        name, equals, _ = words[index].partition("=")
        index += 1
        if not name.startswith("-") or name == "-":
            arguments += 1
        elif name not in known and name not in ROOT_OPTIONS:
            found.append(f"{words[0]} has no option {name}")
        elif not equals and name in known and not getattr(known[name], "is_flag", False):
            index += 1  # its value
    takes = [param for param in VERBS[words[0]].params if param.param_type_name == "argument"]
    least = sum(bool(param.required) for param in takes)
    most = float("inf") if any(param.nargs == -1 for param in takes) else len(takes)
    if not least <= arguments <= most and "[OPTIONS]" not in command:
        found.append(f"{words[0]} takes {least} to {most} arguments, not {arguments}")
    return found


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())), ids=lambda text: text[:60])
def test_the_command_can_be_typed(page, command):
    assert problems(command) == []


@pytest.mark.parametrize("command", ["kvpolicy tone", "kvpolicy tune --trails 3", "kvpolicy show", "kvpolicy show a b"])
def test_a_command_that_cannot_be_typed_is_found(command):
    assert problems(command)
