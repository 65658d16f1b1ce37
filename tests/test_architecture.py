"""Who may import whom, held on the syntax trees of everything that ships."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import house

ROOT = Path(__file__).parents[1]
MAX_LINES = 450
MAX_ROOMS = 20  # at the top of kvpolicy/
MAX_STOREYS = 11
HEAVY = {"transformers", "optuna", "triton", "matplotlib", "typer", "kvpolicy_baklava", "kvpolicy_baselines"}
KERNELS = "kvpolicy_kernels"
PACKAGES = {
    path.parent.name: path.parent
    for pattern in ("kvpolicy", "kernels/*", "plugins/*/kvpolicy_*", "plugins/template/src/*")
    for path in sorted(ROOT.glob(f"{pattern}/py.typed"))
}
ENGINES = frozenset({"kvpolicy_vllm"})  # serve plans elsewhere: distributions of their own, on the core and the kernels
PLUGINS = frozenset(PACKAGES) - {"kvpolicy", KERNELS} - ENGINES
FILES = [(package, path) for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]

# Only these folders of the core import these libraries; `import kvpolicy` needs none of them.
OWNERS = {
    "optuna": "kvpolicy/tuning/",
    "transformers": "kvpolicy/integrations/",
    "typer": "kvpolicy/cli/",
    "matplotlib": "kvpolicy/report/",
    "vllm": "kvpolicy_vllm/",
}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted module of every import, also inside functions; `from a import b` gives "a"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def problems(package: str, path: str, source: str) -> list[str]:
    """What is wrong with one file; `path` is relative to the folder that holds the package, with "/"."""
    return [
        f"{path}:{line}: {reason}"
        for line, module in imports(ast.parse(source))
        if (reason := _problem(package, path, module))
    ]


def _problem(package: str, path: str, module: str) -> str | None:
    top = module.split(".")[0]
    if module.startswith("."):
        return f"relative import of {module}"
    if top in ENGINES and top != package:
        return f"{package} imports {top}, which only its engine does"
    if top in PLUGINS and top != package:
        return f"{package} imports the plugin {top}: plugins are reached through the registry alone"
    if package == KERNELS and top == "kvpolicy":
        return "kernels import the core"
    if package in PLUGINS and top in ("kvpolicy", KERNELS) and "." in module:
        return f"a plugin imports {module}: only the top level of {top} is public"
    if package in ENGINES and top == "kvpolicy" and "." in module:
        return f"{package} imports {module}: only the top level of {top} is public"
    if top == "triton" and (package != KERNELS or not path.endswith("/kernel.py")):
        return "triton outside a kernel.py"
    if top in OWNERS and not path.startswith(OWNERS[top]):
        return f"{top} outside {OWNERS[top]}"
    return None


# What the core asks plugins, it asks in one file, which names whose a fault is.
DOOR = "kvpolicy/plugins/plugin_call.py"
QUESTIONS = {"score_prompt", "score_step", "estimate", "token_maps", "num_forwards", "suggest", "params", "fit"}
OF_ALLOCATORS = {"shares", "split"}  # others have methods of these names too
OF_TASKS = {"samples", "score"}


def calls_of_plugins(path: str, source: str) -> list[str]:
    """Calls of a plugin's methods by a file of the core that is not the one door to them."""
    if (
        path == "kvpolicy/plugins/plugin_call.py"
        or not path.startswith("kvpolicy/")
        or path.startswith("kvpolicy/testing/")
    ):
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, whose = node.func.attr, ast.unparse(node.func.value)
            is_question = name in QUESTIONS or (name in OF_ALLOCATORS and whose.endswith(("allocator", "candidate")))
            is_question = is_question or (name in OF_TASKS and whose.endswith("task"))
            if is_question and whose != "plugin_call":
                found.append(f"{path}:{node.lineno}: {whose}.{name}() is a plugin's: ask through plugin_call")
    return found


def relative(package: str, path: Path) -> str:
    return path.relative_to(PACKAGES[package].parent).as_posix()


def test_all_packages_are_found() -> None:
    assert {"kvpolicy", KERNELS, "kvpolicy_baklava", "kvpolicy_baselines", "kvpolicy_template", *ENGINES} <= set(
        PACKAGES
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_rules(package: str) -> None:
    found = [
        line
        for owner, path in FILES
        if owner == package
        for line in problems(package, relative(package, path), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "path", "source"),
    [
        ("kvpolicy", "kvpolicy/budget/plan.py", "import kvpolicy_baselines"),
        (
            "kvpolicy",
            "kvpolicy/budget/plan.py",
            "def f():\n    from kvpolicy_baklava.allocator import A",
        ),
        ("kvpolicy", "kvpolicy/budget/plan.py", "import optuna"),
        ("kvpolicy", "kvpolicy/tune.py", "import optuna"),
        ("kvpolicy", "kvpolicy/budget/plan.py", "from transformers import AutoConfig"),
        ("kvpolicy", "kvpolicy/budget/plan.py", "import typer"),
        ("kvpolicy", "kvpolicy/budget/plan.py", "import matplotlib.pyplot"),
        ("kvpolicy", "kvpolicy/cache/kernel.py", "import triton"),
        ("kvpolicy", "kvpolicy/budget/plan.py", "from . import spec"),
        (KERNELS, "kvpolicy_kernels/gather/op.py", "import triton.language as tl"),
        (KERNELS, "kvpolicy_kernels/gather/op.py", "from kvpolicy import Budget"),
        (KERNELS, "kvpolicy_kernels/gather/kernel.py", "import kvpolicy_baselines"),
        ("kvpolicy_baklava", "kvpolicy_baklava/x.py", "from kvpolicy.model.spec import Budget"),
        ("kvpolicy_baklava", "kvpolicy_baklava/x.py", "import kvpolicy_kernels.gather"),
        ("kvpolicy_baklava", "kvpolicy_baklava/x.py", "import kvpolicy_baselines"),
        ("kvpolicy", "kvpolicy/budget/plan.py", "import kvpolicy_vllm"),
        ("kvpolicy", "kvpolicy/budget/plan.py", "import vllm"),
        ("kvpolicy_baklava", "kvpolicy_baklava/x.py", "from kvpolicy_vllm import register"),
        ("kvpolicy_vllm", "kvpolicy_vllm/x.py", "from kvpolicy.budget.plan import load_plan"),
        ("kvpolicy_vllm", "kvpolicy_vllm/x.py", "import kvpolicy_baselines"),
        ("kvpolicy_vllm", "kvpolicy_vllm/x.py", "import triton"),
    ],
)
def test_each_rule_catches_its_violation(package: str, path: str, source: str) -> None:
    assert len(problems(package, path, source)) == 1


@pytest.mark.parametrize(
    ("package", "path", "source"),
    [
        ("kvpolicy", "kvpolicy/tuning/study.py", "import optuna, kvpolicy_kernels.gather"),
        ("kvpolicy", "kvpolicy/cli/plugins.py", "import typer"),
        (KERNELS, "kvpolicy_kernels/gather/kernel.py", "import triton, torch"),
        ("kvpolicy_baklava", "kvpolicy_baklava/x.py", "import kvpolicy, kvpolicy_kernels, kvpolicy_baklava.y"),
        (
            "kvpolicy_vllm",
            "kvpolicy_vllm/x.py",
            "import vllm.v1, kvpolicy, kvpolicy_kernels.attention, kvpolicy_vllm.y",
        ),
    ],
)
def test_rules_allow_what_is_right(package: str, path: str, source: str) -> None:
    assert problems(package, path, source) == []


def test_plugins_are_called_through_one_door() -> None:
    sources = {relative(owner, path): path.read_text(encoding="utf-8") for owner, path in FILES}
    assert [call for path, source in sources.items() for call in calls_of_plugins(path, source)] == []


@pytest.mark.parametrize(
    "call",
    ["policy.score_prompt(x)", "self.allocator.split(x, y)", "registry.create(n).params()", "self.task.samples(t)"],
)
def test_a_call_past_the_door_is_caught(call: str) -> None:
    assert len(calls_of_plugins("kvpolicy/cache/x.py", call)) == 1
    assert calls_of_plugins(DOOR, call) == []
    assert calls_of_plugins("kvpolicy/cache/x.py", "plugin_call.split(x); text.split(); schedule.shares(1)") == []


def test_no_file_is_too_long() -> None:
    lengths = {relative(package, path): len(path.read_text(encoding="utf-8").splitlines()) for package, path in FILES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_there_is_no_import_circle() -> None:
    assert house.circles(house.arrows(ROOT)) == []


def test_rooms_are_few_and_stand_in_few_storeys() -> None:
    graph = house.rooms(ROOT)
    assert house.circles(graph) == [], "rooms import each other"
    assert len(graph) <= MAX_ROOMS
    assert 1 + max(house.storeys(graph).values()) <= MAX_STOREYS


def test_no_two_files_of_the_core_share_a_name() -> None:
    assert house.shared_basenames(house.modules(ROOT).values()) == []


def test_circles_and_storeys_are_found() -> None:
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert house.storeys({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}


def test_arrows_are_imports_wherever_they_stand(tmp_path: Path) -> None:
    sources = {
        "__init__": "",
        "a": "def f():\n    from kvpolicy import b",
        "b": "if TYPE_CHECKING:\n    from kvpolicy.c import d\nfrom kvpolicy.a import f",
        "c": "import torch",
    }
    (tmp_path / "kvpolicy").mkdir()
    for name, source in sources.items():
        (tmp_path / "kvpolicy" / f"{name}.py").write_text(source)
    found = {name: targets for name, targets in house.arrows(tmp_path).items() if targets}
    assert found == {"kvpolicy.a": {"kvpolicy.b"}, "kvpolicy.b": {"kvpolicy.a"}}


# Writes into another object's fields, by file; no number may rise.
FOREIGN_WRITES = {
    "kvpolicy/integrations/transformers/attention/masks.py": 5,  # on a copy of its own
    "kvpolicy/integrations/transformers/attention/sources.py": 8,
    # objects of other libraries, which are made to be written to
    "kvpolicy/cli/__init__.py": 1,
    "kvpolicy/cli/configuration.py": 1,
    "kvpolicy/integrations/transformers/cache/ragged_cache.py": 1,
    "kvpolicy/integrations/transformers/attention/soft_attention.py": 2,
    "kvpolicy/integrations/transformers/model/dtype.py": 3,
    "kvpolicy/integrations/transformers/model/load.py": 1,
    "kvpolicy/tuning/search.py": 1,
}


def foreign_writes(source: str) -> list[str]:
    """Attributes that are assigned to on anything but `self` or `cls`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in (part for whole in targets for part in ast.walk(whole)):
            is_written = isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
            if is_written and ast.unparse(target.value) not in ("self", "cls"):
                found.append(ast.unparse(target))
    return found


def test_nobody_writes_into_anothers_fields() -> None:
    counts = {
        relative(package, path): len(foreign_writes(path.read_text(encoding="utf-8")))
        for package, path in FILES
        if package == "kvpolicy"
    }
    assert {path: count for path, count in counts.items() if count} == FOREIGN_WRITES


def test_a_foreign_write_is_found() -> None:
    assert foreign_writes("self.a, x.b = 1, 2\nfor i in x: i.c += 1\nx.d[0] = 3\nself.e.f = 4") == [
        "x.b",
        "self.e.f",
        "i.c",
    ]


def loaded_by(code: str) -> set[str]:
    code = f"import sys; {code}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_kvpolicy_loads_nothing_but_itself() -> None:
    assert not {"torch", "numpy", "pluggy", *HEAVY} & loaded_by("import kvpolicy")


def test_names_of_the_core_load_no_heavy_library() -> None:
    names = ("registry", "BudgetPlan", "RaggedStore", "ModelSpec", "EvictionPolicy", "apportion")
    assert not HEAVY & loaded_by("import kvpolicy; " + "; ".join(f"kvpolicy.{name}" for name in names))


def test_a_list_of_the_plugins_loads_no_heavy_library() -> None:
    code = "import os; os.environ['KVPOLICY_PLUGINS'] = ''; import kvpolicy.cli.plugins; kvpolicy.registry.rows()"
    assert {"torch", "numpy", *HEAVY} & loaded_by(code) == {"typer", "kvpolicy_baklava", "kvpolicy_baselines"}


def test_help_and_version_load_no_heavy_library() -> None:
    code = """
import contextlib, io, sys
from kvpolicy.cli import app, main
verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
for arguments in (["--help"], ["--version"], *([verb, "-h"] for verb in verbs)):
    sys.argv = ["kvpolicy", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    assert out.getvalue(), arguments
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "kvpolicy.cli.tune" in loaded
    assert not {"torch", "numpy", *HEAVY} & {*loaded} - {"typer"}
