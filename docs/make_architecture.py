"""Draws the diagrams in docs/images. The rooms and their arrows come from the imports in the code.

`python docs/make_architecture.py` writes them, `--check` fails where one differs from what is committed.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import house  # noqa: E402  # the same figures that the tests hold

IMAGES = ROOT / "docs" / "images"
STYLE = (
    "rect{fill:#e0f2f1;stroke:#00796b;stroke-width:1.5;rx:6}path{stroke:#546e7a;stroke-width:1.3;fill:none;"
    "marker-end:url(#tip)}text{font:15px sans-serif;fill:#102027;text-anchor:middle}"
    ".small{font-size:12px;fill:#37474f}.back{fill:#fff}"
)
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8z" style="fill:#546e7a;stroke:none;marker-end:none"/></marker>'
)
WIDE, TALL = 132, 44  # of a box

SAYS = {
    "errors": "whose fault it is",
    "progress": "how far it is",
    "defaults": "if nothing is given",
    "files": "reading and writing",
    "model": "layers and heads",
    "tasks": "questions, needles",
    "plugins": "roles and registry",
    "text": "corpus and its split",
    "budget": "retention to entries",
    "cache": "the ragged store",
    "testing": "conformance kit",
    "integrations": "transformers",
    "measure": "heads, memory, losses",
    "comparison": "methods side by side",
    "tuning": "the search",
    "report": "tables and pictures",
    "verbs": "eval, compare, ...",
    "cli": "kvpolicy at a shell",
}


def rooms() -> str:
    """Rooms in storeys. An arrow that follows from two others is left out."""
    graph = house.rooms(ROOT)
    height = house.storeys(graph)
    top = max(height.values())
    floors = [sorted(room for room in graph if height[room] == storey) for storey in range(top + 1)]
    width, place = 620, {}
    for storey, members in enumerate(floors):
        for index, room in enumerate(members):
            place[room] = (width * (index + 1) / (len(members) + 1), 40 + 84 * (top - storey))
    arrows = [
        _arrow(place[room], place[target])
        for room in graph
        for target in sorted(graph[room])
        if not any(target in _below(graph, other) for other in graph[room] - {target})
    ]
    boxes = [_box(*place[room], room, SAYS[room]) for room in sorted(place)]
    return _svg(width, 80 + 84 * top, [*arrows, *boxes])


def token_life() -> str:
    """From the model's new keys to an eviction."""
    steps = [
        ("arrived", "update() took its key and value"),
        ("waiting", "layers that share it still read it"),
        ("pending", "may still be taken back"),
        ("settled", "in the arena, or given up at once"),
        ("evicted", "its slot went to another token"),
    ]
    reasons = ["attention runs", "the last reader is done", "nothing can take it back", "another one scores higher"]
    parts = []
    for index, (name, says) in enumerate(steps):
        y = 40 + 92 * index
        if index:
            parts += [_arrow((150, y - 92), (150, y)), _note(165, y - 42, reasons[index - 1])]
        parts += [_box(150, y, name, ""), _note(235, y + 4, says)]
    return _svg(480, 80 + 92 * (len(steps) - 1), parts)


def main_job() -> str:
    """From calibration text to a plan."""
    boxes = {
        "calibration text": (80, 60, ""),
        "estimator": (270, 60, "how much a head matters"),
        "allocator": (510, 60, "splits the budget"),
        "apportion": (725, 60, "to whole entries"),
        "search": (510, 190, "Optuna"),
        "one forward": (725, 190, "the loss under the table"),
        "plan.json": (270, 190, "the best of each level"),
        "eviction policy": (725, 300, "which entries a head keeps"),
    }
    ways = [
        ("calibration text", "estimator", ""),
        ("estimator", "allocator", "importance"),
        ("allocator", "apportion", "shares"),
        ("apportion", "one forward", "capacities"),
        ("one forward", "search", "loss"),
        ("search", "allocator", "parameters"),
        ("search", "plan.json", "best"),
        ("eviction policy", "one forward", ""),
    ]
    parts = [_way(boxes[start], boxes[end], says) for start, end, says in ways]
    parts += [_box(x, y, name, says) for name, (x, y, says) in boxes.items()]
    return _svg(830, 340, parts)


def _way(start: tuple[float, float, str], end: tuple[float, float, str], says: str) -> str:
    """A straight arrow from box to box, along a row or a column, with what goes along it."""
    (x, y, of), (u, v, at) = start, end
    if y == v:
        side = 1 if u > x else -1
        x, u = x + side * _half(of), u - side * _half(at)
        return f'<path d="M{x:.0f} {y}L{u:.0f} {v}"/>' + _label((x + u) / 2, y - 8, says)
    side = 1 if v > y else -1
    y, v = y + side * TALL / 2, v - side * TALL / 2
    return f'<path d="M{x} {y:.0f}L{u} {v:.0f}"/>' + _label(x + 42, (y + v) / 2 + 4, says)


def roles() -> str:
    """Who asks whom, from top to bottom."""
    lanes = {"tune": 70, "estimator": 230, "allocator": 390, "search": 550, "model": 710}
    steps = [
        ("tune", "estimator", "estimate(probe)"),
        ("estimator", "model", "activations of calibration prompts"),
        ("estimator", "tune", "importance"),
        ("tune", "model", "for each retention: loss of uniform capacities"),
        ("tune", "allocator", "if it learns: fit(probe, ...)"),
        ("allocator", "model", "soft_loss(bias), step by step"),
        ("search", "allocator", "for each trial: suggest, shares"),
        ("search", "model", "loss(apportion(shares))"),
        ("tune", "model", "held-out loss: the best, and uniform"),
        ("tune", "tune", "write the plan"),
    ]
    bottom = 90 + 46 * len(steps)
    parts = [
        f'<path d="M{x} 62V{bottom}" style="stroke-dasharray:3 4;marker-end:none"/>{_box(x, 40, name, "")}'
        for name, x in lanes.items()
    ]
    for index, (start, end, says) in enumerate(steps):
        y, x, u = 105 + 46 * index, lanes[start], lanes[end]
        if start == end:
            parts += [f'<path d="M{x} {y}h28v14h-28"/>', _note(x + 36, y + 11, says)]
            continue
        parts += [f'<path d="M{x} {y}H{u}"/>', _label((x + u) / 2, y - 6, says)]
    return _svg(800, bottom + 10, parts)


def _half(says: str) -> float:
    return max(WIDE / 2, 3.6 * len(says))


def _label(x: float, y: float, says: str) -> str:
    """On a ground of its own, for it may lie on lines."""
    ground = 'style="paint-order:stroke;stroke:#fff;stroke-width:5"'
    return f'<text class="small" x="{x:.0f}" y="{y:.0f}" {ground}>{escape(says)}</text>' if says else ""


def _below(graph: house.Graph, room: str) -> set[str]:
    return graph[room] | {other for target in graph[room] for other in _below(graph, target)}


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (u, v) = start, end
    y, v = y + TALL / 2, v - TALL / 2
    bend = (v - y) / 2
    return f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {u:.0f} {v - bend:.0f} {u:.0f} {v:.0f}"/>'


def _box(x: float, y: float, name: str, says: str) -> str:
    """A box around (x, y) with a name, and under it what is in there."""
    label = f'<text x="{x:.0f}" y="{y + (-2 if says else 5):.0f}">{escape(name)}</text>'
    if says:
        label += f'<text class="small" x="{x:.0f}" y="{y + 15:.0f}">{escape(says)}</text>'
    half = _half(says)
    return f'<rect x="{x - half:.0f}" y="{y - TALL / 2:.0f}" width="{2 * half:.0f}" height="{TALL}"/>{label}'


def _note(x: float, y: float, says: str) -> str:
    return f'<text class="small" x="{x}" y="{y}" style="text-anchor:start">{escape(says)}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    view = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {view}>', f"<style>{STYLE}</style><defs>{TIP}</defs>"]
    lines.append('<rect class="back" width="100%" height="100%" style="stroke:none"/>')
    return "\n".join([*lines, *parts, "</svg>", ""])


def main(check: bool) -> None:
    drawn = {"rooms": rooms(), "token_life": token_life(), "main_job": main_job(), "roles": roles()}
    for name, picture in ((f"{name}.svg", picture) for name, picture in drawn.items()):
        path = IMAGES / name
        if not check:
            path.write_text(picture, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != picture:
            sys.exit(f"docs/images/{name} is not what the code says: python docs/make_architecture.py")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
