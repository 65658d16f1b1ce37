"""The tutorial for authors of plugins: its files are the template's, and its commands do what it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvpolicy.plugins.checks import SAYS
from kvpolicy.plugins.source_table import supplied_by

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "plugins" / "template"
PAGE = (ROOT / "docs" / "tutorial" / "first-plugin.md").read_text(encoding="utf-8")
POLICY_PAGE = (ROOT / "docs" / "how-to" / "write-eviction-policy.md").read_text(encoding="utf-8")
SHOWN = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
FILES = [(name, text) for name, text in SHOWN if not name.startswith("my-policy/")]
TWO_FILES = [(name, text) for name, text in SHOWN if name.startswith("my-policy/")]
COMMANDS = [line[2:] for line in PAGE.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize(("name", "shown"), FILES, ids=[name for name, _ in FILES])
def test_a_file_on_the_page_is_the_templates(name, shown):
    assert shown == (TEMPLATE / name).read_text(encoding="utf-8"), "copy the file into docs/tutorial/first-plugin.md"


def test_the_page_shows_all_that_a_package_needs():
    packaged = {path.relative_to(TEMPLATE).as_posix() for path in TEMPLATE.glob("src/*/*.py")}
    assert {name for name, _ in FILES} >= {"pyproject.toml", "tests/test_key_norm.py", *packaged}


@pytest.fixture
def own(tmp_path):
    """The template, copied, and renamed by the page's commands."""
    shutil.copytree(TEMPLATE, tmp_path / "my-plugin", ignore=shutil.ignore_patterns("__pycache__"))
    for command in COMMANDS:
        if command.startswith(("mv ", "sed ")):
            subprocess.run(command, shell=True, cwd=tmp_path / "my-plugin", check=True)
    return tmp_path / "my-plugin"


def run(folder, *command, source="src"):
    """Standard output of Python in a package's folder, with the package found as an installed one is."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / source / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["kvpolicy"].items())
    (info / "entry_points.txt").write_text(f"[kvpolicy]\n{entries}")
    path = os.pathsep.join([str(folder / source), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


LISTED = "import kvpolicy; print([r.name for r in kvpolicy.registry.rows() if r.distribution == 'kvpolicy-mine'])"


@pytest.mark.skipif(sys.platform != "linux", reason="the commands are those of GNU")
@pytest.mark.slow  # pip builds and installs the copy
def test_a_copy_is_renamed_and_what_is_not_needed_is_removed(own):
    texts = [path.read_text(encoding="utf-8") for path in own.rglob("*") if path.is_file()]
    assert not any("kvpolicy_template" in text or "kvpolicy-template" in text for text in texts)
    assert run(own, "-c", LISTED).strip() == "['value_norm', 'softmax', 'key_norm']"
    (remove,) = [command for command in COMMANDS if command.startswith("rm ")]
    subprocess.run(remove, shell=True, cwd=own, check=True)
    hook = own / "src" / "kvpolicy_mine" / "__init__.py"
    calls = re.compile(r"    register\.(estimator|allocator)\(\n.*?\n    \)\n", re.DOTALL)
    hook.write_text(calls.sub("", hook.read_text(encoding="utf-8")), encoding="utf-8")
    assert run(own, "-c", LISTED).strip() == "['key_norm']"
    assert "3 passed" in run(own, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_a_package_of_two_files_keeps_the_laws_and_is_found(tmp_path):
    assert [name for name, _ in TWO_FILES] == ["my-policy/pyproject.toml", "my-policy/my_policy.py"]
    (tmp_path / "my-policy").mkdir()
    for name, text in TWO_FILES:
        (tmp_path / name).write_text(text, encoding="utf-8")
    (laws,) = [shlex.split(command) for command in COMMANDS if command.startswith("python -c ")]
    found = "import kvpolicy; print(kvpolicy.registry.get('policy', 'my-policy:fading').__name__)"
    code = f"{laws[2]}\n{found}"
    assert run(tmp_path / "my-policy", "-c", code, source=".").strip() == "FadingPolicy"


def rows(head):
    """The cells of the table with this first cell, row by row."""
    table = POLICY_PAGE.split(f"| {head} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_table_of_sources_lists_what_a_policy_may_require():
    listed = {name: row for row in rows("`requires`") for name in re.findall(r"`(\w+)`", row[0])}
    assert listed.keys() == supplied_by("store", "model", "step")
    assert {name for name, row in listed.items() if row[2]} == supplied_by("step")
    inside = supplied_by("store", "model")
    unseen = {"rotary", "scale", "output_weight", "module"}  # the reference says what they are
    assert {name for name, row in listed.items() if row[1]} == inside - unseen


def test_the_table_of_fields_lists_what_a_policy_says_of_itself():
    assert {name for row in rows("field") for name in re.findall(r"^`(\w+)`$", row[0])} == SAYS["policy"].keys() - {
        "requires"
    }
