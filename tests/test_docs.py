"""The documentation says what the code is: the generated page, the public names, and every block of Python."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kvpolicy

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NEEDS_MODEL = 'title="needs the default model"'
CONTINUED = 'title="continued"'  # goes on where the block before it ended
FENCE = re.compile(r"^```python *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = DOCS / "how-to" / "run-a-plan.md"
# the pages use the name that every supported release of transformers takes, and say so
RENAMED = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
PAGES = [
    ROOT / "README.md",
    DOCS / "index.md",
    DOCS / "reference" / "kernels.md",
    *sorted((DOCS / "how-to").glob("*.md")),
]


def blocks(needs_model: bool, pages: list[Path] = PAGES) -> list:
    """One pytest parameter (page, line, code) for each block of Python, with the blocks that continue it."""
    found: list[tuple[str, str, str]] = []  # title, page and line, code
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 1
            title, where, code = match[1], f"{page.relative_to(ROOT).as_posix()}:{line}", ""
            if title == CONTINUED:
                title, where, code = found.pop()
            found.append((title, where, code + "\n" * (line - code.count("\n")) + match[2]))
    return [
        pytest.param(where, code, id=where) for title, where, code in found if (title == NEEDS_MODEL) == needs_model
    ]


def run(where: str, code: str) -> None:
    exec(compile(code, where, "exec", dont_inherit=True), {"__name__": "documented"})


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_the_command_line_is_what_the_command_line_says():
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert page == script("make_cli_reference").render(), "run python docs/make_cli_reference.py"


def test_check_fails_for_a_page_that_differs(tmp_path, monkeypatch, capsys):
    reference = script("make_cli_reference")
    monkeypatch.setattr(reference, "PAGE", tmp_path / "reference" / "cli.md")
    monkeypatch.setattr(sys, "argv", ["make_cli_reference.py", "--check"])
    assert reference.main() == 1
    reference.PAGE.parent.mkdir()
    reference.PAGE.write_text(reference.render().replace("--retention", "--kept"), encoding="utf-8")
    assert reference.main() == 1
    assert "run python docs/make_cli_reference.py" in capsys.readouterr().err
    reference.PAGE.write_text(reference.render(), encoding="utf-8")
    assert reference.main() == 0


def test_every_option_of_the_help_is_on_the_page():
    from typer.testing import CliRunner

    from kvpolicy.cli import app

    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    for verb in re.findall(r"^## kvpolicy (\w+)$", page, re.MULTILINE):
        section = page.split(f"## kvpolicy {verb}\n")[1].split("\n## ")[0]
        printed = CliRunner().invoke(app, [verb, "--help"], env=environment).output
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", printed)) - {"--help"}
        rows = "\n".join(line for line in section.splitlines() if line.startswith("| `"))
        assert "--json" in options
        assert {option for option in options if f"`{option}`" not in rows} == set(), verb


@pytest.mark.parametrize("name", kvpolicy.__all__)
def test_public_name_is_in_the_reference(name):
    pages = [page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md"))]
    assert any(re.search(rf"\b{name}\b", page) for page in pages)


def test_the_readme_and_the_first_page_promise_the_same():
    tables = []
    for page in (ROOT / "README.md", DOCS / "index.md"):
        text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", page.read_text(encoding="utf-8"))
        tables.append(re.search(r"\| what you get.*?\n\n", text, re.DOTALL)[0])
    assert tables[0] == tables[1]


def test_the_readme_promises_what_committed_files_say():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    with (ROOT / "benchmarks" / "results" / "decode_graph_h200.csv").open(encoding="utf-8") as file:
        runs = [run for run in csv.DictReader(file) if run["context"] == "32768"]

    def token(cache: str, policy: str, kept: str) -> str:
        own = [run for run in runs if (run["cache"], run["policy"], run["kept"]) == (cache, policy, kept)]
        return f"{float(next(run['ms_per_token'] for run in own if run['budget'] != 'fixed')):.1f} ms"

    def batch(cache: str) -> str:
        largest = max((run for run in runs if run["cache"] == cache), key=lambda run: int(run["batch"]))
        return f"{largest['batch']} sequences, {float(largest['tokens_per_second']):,.0f} tokens/s"

    ours = f"{token('kvpolicy', 'streaming', '0.3')}; {token('kvpolicy, compiled', 'streaming', '0.3')} compiled"
    assert f"behind 32k tokens | {token('DynamicCache, eager, flash', '', '1.0')} | {ours} |" in text
    assert f"at 32k tokens | {batch('DynamicCache, eager')} | {batch('kvpolicy, slots')}, at 20 % |" in text
    plan = kvpolicy.load_plan(ROOT / "plans" / "smollm2-135m-snapkv" / "plan.json")
    found = {level.retention: level.retrieval["passkey"] for level in plan.levels}
    count, kept = found[0.3]["n"], round(found[0.3]["score"] * found[0.3]["n"])
    assert f"in {count} prompts of {found[0.3]['length']} tokens | {count} | {kept} |" in text
    assert found[0.05]["score"] == 0 and "At 5 % kept that plan finds no number any more" in text
    spent = {run["retention"]: run["seconds"] for run in plan.provenance["calibration"]}
    assert f"{spent[None] + spent[0.3]:.0f} s of a GPU for 30 %" in text


def test_blocks_are_found_and_marked():
    assert len(blocks(needs_model=False)) > 8 and len(blocks(needs_model=True)) > 1
    for page in PAGES:
        titles = {match[1] for match in FENCE.finditer(page.read_text(encoding="utf-8"))}
        assert titles <= {"", NEEDS_MODEL, CONTINUED}, page


def test_continued_blocks_run_as_one_and_keep_their_lines():
    (joined, *_), page = blocks(needs_model=False, pages=[RUN]), RUN.read_text(encoding="utf-8").splitlines()
    where, code = joined.values
    assert where.startswith("docs/how-to/run-a-plan.md:")
    assert code.count("import kvpolicy") == 1 and code.count("new_cache(") > 3
    assert all(line in ("", page[number]) for number, line in enumerate(code.splitlines()))


@RENAMED
@pytest.mark.parametrize(("where", "code"), blocks(needs_model=False))
def test_block_runs(where, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(where, code)


@RENAMED
@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize(("where", "code"), blocks(needs_model=True))
def test_block_runs_with_the_default_model(where, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(where, code)


@pytest.mark.slow
def test_figures_of_the_tutorials_prompt_are_those_of_the_page_that_it_feeds(smollm2):
    from kvpolicy.cli.generate import _encode

    page = (DOCS / "tutorial" / "first-plan.md").read_text(encoding="utf-8")
    fed = (DOCS / "explanation" / "roles.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"kept +(\d+) of (\d+) entries \(([\d.]+)%\)", page)
    (tokens,) = re.findall(r"(\d+) tokens of prompt times 90", page)
    kept, seen, part = found
    length = _encode(smollm2[1], fed, no_chat=False)[0].shape[1]
    assert int(tokens) == length
    assert (int(kept), int(seen)) == (round(0.3 * length * 90), (length + 59) * 90)
    assert part == f"{100 * int(kept) / int(seen):.1f}"


def test_lines_about_parameters_become_a_list():
    pytest.importorskip("griffe")
    as_list = script("docstring_fields").as_list
    text = "One line.\n\nlow, high: bounds,\n    both included\nname: a word\nMore.\nnote: not a parameter"
    expected = (
        "One line.\n\n\n- `low`, `high`: bounds,\n    both included\n- `name`: a word\n\nMore.\nnote: not a parameter"
    )
    assert as_list(text, {"low", "high", "name"}) == expected


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "reference" / "cli" / "index.html").is_file()
    tutorial = (tmp_path / "site" / "tutorial" / "first-plugin" / "index.html").read_text(encoding="utf-8")
    shown = re.sub(r"<[^>]+>", "", tutorial)
    for name in (
        "def kvpolicy_register(",
        "class ValueNormEstimator(",
        "class SoftmaxAllocator(",
        "class KeyNormPolicy(",
    ):
        assert name in shown, "a file of plugins/template is not included"
