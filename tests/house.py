"""The house in numbers: rooms, storeys, circles, arrows, lengths, comments, names.

`python -m tests.house [FOLDER]` prints them for the package `kvpolicy` in a folder; the default is this repository.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name to file, of everything in `root`/kvpolicy."""
    return {_dotted(path.relative_to(root)): path for path in sorted((root / "kvpolicy").rglob("*.py"))}


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows(root: Path) -> dict[str, set[str]]:
    """Which module imports which, also inside functions. What is imported for annotations alone does not count."""
    files = modules(root)
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for target in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            module = target if target in files else target.rpartition(".")[0]
            if module in files and module != name:
                found[name].add(module)
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def rooms(root: Path) -> dict[str, set[str]]:
    """The same between the folders and files at the top of `kvpolicy/`. The door, `__init__.py`, is not a room."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in arrows(root).items():
        if module != "kvpolicy":
            found[_room(module)] |= {_room(target) for target in targets if target != "kvpolicy"} - {_room(module)}
    return dict(found)


def _room(module: str) -> str:
    return module.split(".")[1]


def circles(graph: Graph) -> list[list[str]]:
    """The sets of nodes that reach each other, largest first: each is one import circle, or several that touch."""
    reached = {node: _reached(graph, node) for node in graph}
    sets = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return sorted((sorted(members) for members in sets if members), key=len, reverse=True)


def _reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += graph[node]
    return seen


def storeys(graph: Graph) -> dict[str, int]:
    """Storey of each node: 0 where it imports nothing, else one above the highest that it imports. Takes no circles."""
    heights: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in heights:
            heights[node] = 1 + max((height(target) for target in graph[node]), default=-1)
        return heights[node]

    for node in graph:
        height(node)
    return heights


def shared_basenames(paths: Iterable[Path]) -> list[str]:
    """File names that stand in several folders, but for `__init__.py`."""
    counts = Counter(path.name for path in paths)
    return sorted(name for name, count in counts.items() if count > 1 and name != "__init__.py")


def main(root: Path) -> None:
    graph, files = rooms(root), modules(root)
    found = circles(arrows(root))
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in files.values()}
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in files.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    total = sum(map(len, lines.values()))
    comments = sum(map(_comments, files.values()))
    cuts = statistics.quantiles(functions, n=10)
    print(f"rooms at the top           {len(graph)}, arrows between them {sum(map(len, graph.values()))}")
    print(f"storeys                    {'-' if circles(graph) else 1 + max(storeys(graph).values())}")
    print(f"circles of modules         {len(found)} {found or ''}")
    print(f"function lines p50 / p90   {cuts[4]:.0f} / {cuts[8]:.0f}, of {len(functions)}")
    print(f"files over 300 lines       {sum(len(text) > 300 for text in lines.values())}, of {len(files)}")
    print(f"comments per 1000 lines    {1000 * comments / total:.1f}, of {total}")
    print(f"basenames used twice       {' '.join(shared_basenames(files.values())) or 0}")


def _comments(path: Path) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
