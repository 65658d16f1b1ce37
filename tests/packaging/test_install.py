"""What a user gets: the built wheels in a fresh environment, with a third-party plugin beside kvpolicy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "plugins" / "template"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output; fails the test with everything the command printed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "KVPOLICY_PLUGINS", "VIRTUAL_ENV")}
    result = subprocess.run([*map(str, command)], cwd=cwd, env={**inherited, **env}, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} exits {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@dataclass(frozen=True)
class Installed:
    folder: Path
    python: Path
    wheels: tuple[Path, Path]

    def code(self, code: str, **env: str) -> str:
        return run(self.python, "-W", "error", "-c", code, cwd=self.folder, **env)

    def kvpolicy(self, *arguments: str) -> str:
        return run(self.python.parent / "kvpolicy", *arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """kvpolicy and the template, built as wheels and installed; torch and the rest are the running environment's."""
    folder = tmp_path_factory.mktemp("install")
    for project in (ROOT, TEMPLATE):
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project, cwd=folder)
    wheels = sorted(folder.glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["kvpolicy", "kvpolicy_template"]
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", *wheels, cwd=folder)
    # After pip, which must not see the kvpolicy that may be installed there. Paths from a .pth come last on sys.path,
    # and .pth files in them (an editable kvpolicy) are not read.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(TEMPLATE / "tests", folder / "tests")
    shutil.copy(TEMPLATE / "pyproject.toml", folder)
    return Installed(folder, python, (wheels[0], wheels[1]))


def test_imports_come_from_the_wheels(installed: Installed) -> None:
    modules = "kvpolicy", "kvpolicy_kernels", "kvpolicy_baklava", "kvpolicy_baselines", "kvpolicy_template"
    printed = installed.code(f"import {', '.join(modules)}\nfor m in ({', '.join(modules)}): print(m.__file__)")
    for path in printed.split():
        assert Path(path).is_relative_to(installed.folder / "venv"), path


def test_wheel_holds_the_packages_and_nothing_else(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheels[0]).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"kvpolicy", "kvpolicy_kernels", "kvpolicy_baklava", "kvpolicy_baselines"}
    assert {f"{top}/py.typed" for top in tops} <= set(names)
    assert not [name for name in names if "test_" in name or "benchmark" in name]


def test_plugins_verb_lists_the_third_party_beside_the_builtins(installed: Installed) -> None:
    rows = json.loads(installed.kvpolicy("plugins", "--json"))
    assert {row["status"] for row in rows} == {"ok"}, rows
    assert {"role", "name", "distribution", "status", "error"} <= rows[0].keys()
    owners = {(row["role"], row["name"]): row["distribution"] for row in rows}
    assert owners["estimator", "value_norm"] == owners["policy", "key_norm"] == "kvpolicy-template"
    assert owners["estimator", "cosine"] == owners["policy", "streaming"] == "kvpolicy"


def test_allow_list_leaves_the_third_party_out(installed: Installed) -> None:
    names = installed.code("import kvpolicy; print(*kvpolicy.registry.names('policy'))", KVPOLICY_PLUGINS="")
    assert "streaming" in names.split() and "key_norm" not in names.split()


TINY_MODEL = """
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("tiny")
LlamaForCausalLM(LlamaConfig(
    vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)).save_pretrained("tiny")
"""


def test_tune_uses_the_third_party_by_name(installed: Installed) -> None:
    run(installed.python, "-c", TINY_MODEL, cwd=installed.folder)
    third_party = ("--estimator", "value_norm", "--allocator", "softmax")
    size = ("--model", "tiny", "--retention", "0.5", "--context", "128", "--trials", "2", "--device", "cpu")
    installed.kvpolicy("tune", *third_party, *size, "--out", "plan.json", "--quiet")
    method = json.loads((installed.folder / "plan.json").read_text())["method"]
    assert (method["estimator"]["name"], method["allocator"]["name"]) == ("value_norm", "softmax")


def test_template_tests_pass(installed: Installed) -> None:
    assert " passed" in run(installed.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=installed.folder)
