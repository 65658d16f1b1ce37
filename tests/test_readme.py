"""README followed to the letter, twice in one folder: the commands, then the Python, with the model they name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = 'DEMO="--context 256 --trials 2 --retention 0.3 --device cpu"'
"""The level of README's Python, whose search is then another one of the same model at the same level in one folder."""
COMMANDS = re.findall(r"^\$ (.*)$", README, re.MULTILINE)
OTHERS = {"make test", "make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"}
"""One runs for as long as all tests, the other installs."""


def test_readme_has_the_commands_that_are_followed_here():
    assert [command for command in COMMANDS if command not in OTHERS] == [
        "make demo",
        ". .venv/bin/activate",
        "kvpolicy generate plan.json --retention 0.3 --prompt-file docs/explanation/roles.md --max-new-tokens 32",
    ]
    assert set(COMMANDS) > OTHERS


@pytest.fixture
def clone(tmp_path, smollm2):
    """The repository without its history, and the environment of this test as if `make` had installed it."""
    environment, listed = (
        Path(sys.prefix),
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True),
    )
    if listed.returncode or not (environment / "pyvenv.cfg").is_file():
        pytest.skip("needs a git checkout and a virtual environment")
    for name in listed.stdout.splitlines():
        if name.partition("/")[0] not in ("tests", "benchmarks"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    venv = tmp_path / ".venv"
    venv.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (venv / name).symlink_to(environment / name)
    for name in (".package", ".model", ".tools"):
        (venv / name).touch()
    return tmp_path


@pytest.mark.slow
def test_readme_followed_twice_in_one_folder_ends_well(clone):
    commands = [f"{x} {SMALL}" if x == "make demo" else x for x in COMMANDS if x not in OTHERS]
    (block,) = re.findall(r"^```python[^\n]*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (clone / "readme.py").write_text(block, encoding="utf-8")
    path = [each for each in os.environ["PATH"].split(os.pathsep) if not (Path(each) / "kvpolicy").exists()]
    env = os.environ | {"PATH": os.pathsep.join(path)}
    script = "\n".join(["set -e", *commands, "python readme.py"])
    for again in (False, True):
        done = subprocess.run(["bash", "-c", script], cwd=clone, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"the {'second' if again else 'first'} time\n{done.stdout}\n{done.stderr}"
        assert "look at it with: .venv/bin/kvpolicy show plan.json" in done.stdout, "it is not on the PATH yet"
        assert "kept: 27648 of " in done.stdout, "what the Python block says it prints"
        assert (clone / "demo.png").is_file()
        table = re.findall(r"^(full|BaKlaVa|recommended) .*\d of 10 ", done.stdout, re.MULTILINE)
        assert table == ["full", "BaKlaVa", "recommended"]
    (pasted,) = re.findall(r"^  (\S+/kvpolicy generate .*)$", done.stdout, re.MULTILINE)
    assert subprocess.run(["bash", "-c", pasted], cwd=clone, env=env, capture_output=True, timeout=300).returncode == 0
