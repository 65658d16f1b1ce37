"""The benchmarks start on any machine: `--help` of each, in this process, which has imported torch already."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "benchmarks", ROOT / "kernels" / "benchmarks", ROOT / "plugins" / "vllm" / "benchmarks")
MODULES = {"basics", "harness", "shapes", "shared", "side_by_side", "task_lines"}  # what the scripts have in common
SCRIPTS = [path for folder in FOLDERS for path in sorted(folder.glob("*.py")) if path.stem not in MODULES]


WITH_KERNELS = ("decode_formats", "decode_graph", "decode_windows", "prefill")


@pytest.fixture
def alone(monkeypatch):
    """Modules of the benchmarks' folders are found, and forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*map(str, FOLDERS), *sys.path])
    yield
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if path and Path(path).parent in FOLDERS:
            del sys.modules[name]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_needs_no_gpu(script, monkeypatch, capsys):
    if script.parent.parent.name == "kernels" or script.stem in WITH_KERNELS:
        pytest.importorskip("triton")
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_columns_are_those_of_all_rows(tmp_path, alone):
    from basics import read_csv, write_csv

    path = tmp_path / "new" / "rows.csv"
    write_csv(path, [{"a": 1, "b": 2}, {"a": 3, "c": "x,y"}])
    assert read_csv(path) == [{"a": "1", "b": "2", "c": ""}, {"a": "3", "b": "", "c": "x,y"}]
    assert path.read_text().splitlines()[0] == "a,b,c"
