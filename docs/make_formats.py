"""Writes the tables of formats into docs/methods from benchmarks/results. `--check` fails where they differ.

A table stands between `<!-- formats: NAME -->` and `<!-- formats: end -->`. A cell is the divergence from the full
cache in nats a token. Parts are of means over the same sequences, with 95 % bootstrap intervals over these.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from shared import read_csv
from torch import Tensor

from kvpolicy.measure.stats import relative_increase

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PROMPT, WINDOW = "formats_prompt_h200.csv", "formats_window_h200.csv"
SECOND_PROMPT, SECOND_WINDOW = "formats_prompt_qwen_h200.csv", "formats_window_qwen_h200.csv"
CENTRE, LONG = "key_centre_h200.csv", "key_centre_long_h200.csv"
FACTS, CHOICE = "format_facts_h200/facts.csv", "format_choice_cpu.csv"
PAGES = [DOCS / "methods" / "formats.md", DOCS / "methods" / "fisher.md"]
PLACE = re.compile(r"(<!-- formats: ([a-z, ]+\w) -->\n).*?(<!-- formats: end -->)", re.DOTALL)
FULL_PRECISION = "16 bits"
NAMES = {"int4": "`int4`", "int8": "`int8`", "model": FULL_PRECISION}
LATEST = "less their bias", "less their centre"
KINDS = {"everything": "everything kept", "equal": "equal", "learned": "learned"}

TASKS = {"passkey": "pass key", "key-value": "key-value"}

Row = dict[str, str]


def number(value: float) -> str:
    """Two digits, three from .1 on; no zero before the point."""
    return f"{value:.3f}".lstrip("0") if value >= 0.01 else f"{value:.4f}".lstrip("0")


def two(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def percent(value: str) -> str:
    return f"{100 * float(value):g} %"


def divergences(row: Row) -> Tensor:
    return torch.tensor([float(kl) for kl in row["each_kl"].split()])


def part(row: Row, base: Row) -> str:
    """Of the other's divergence, and its interval."""
    mean, low, high = (1 + x for x in relative_increase(divergences(row), divergences(base)))
    return f"{two(mean)} ({two(low)} to {two(high)})"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    return line(head) + "|---" * len(head) + "|\n" + "".join(map(line, rows))


def frontier(file: str, compared: tuple[str, ...] = ("int4",)) -> str:
    """Of a protocol: a line for each policy, format and kind of capacities; and of the formats that are compared what
    learned capacities leave of the best in 16 bits.
    """
    rows = read_csv(RESULTS / file)
    levels = sorted({row["level"] for row in rows if row["level"] != "1.0"}, key=float, reverse=True)
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        kind = next(kind for kind in KINDS if kind in row["capacities"])
        key = row["policy"].partition("(")[0], NAMES[row["format"]], kind
        lines.setdefault(key, {})[row["level"]] = row
    body = []
    for (policy, own, kind), found in lines.items():
        if kind != "everything":
            cells = [shown(found[level]) if level in found else "" for level in levels]
        elif own == FULL_PRECISION:
            continue  # the full cache itself
        else:
            row = found["1.0"]
            cells = [f"{shown(row)} at {100 * float(row['bytes']):.1f} %", *[""] * (len(levels) - 1)]
        body.append([f"`{policy}`", own, KINDS[kind], *cells])
    for policy, own, kind in lines:
        if own in map(NAMES.get, compared) and kind == "learned":
            cells = []
            for level in levels:
                exact = [x[level] for (_, name, _), x in lines.items() if name == FULL_PRECISION and level in x]
                row = lines[policy, own, kind].get(level)
                best = min(exact, key=lambda x: float(x["kl"]), default=None)
                cells.append("" if row is None or best is None else part(row, best))
            body.append([f"`{policy}`", own, "of the best in 16 bits", *cells])
    return table(["policy", "format", "capacities", *map(percent, levels)], body)


def shown(row: Row) -> str:
    return f"{number(float(row['kl']))} ({float(row['perplexity']):.2f})"


def centres(file: str) -> str:
    """With everything kept, what codes lose of keys whole and less a centre: the divergence's interval, and perplexity.

    Later centres come behind former ones, whenever they were measured.
    """
    rows = read_csv(RESULTS / file)
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    names, later = [*dict.fromkeys(row["format"] for row in rows)], dict(zip(LATEST, (1, 2), strict=True))
    for row in sorted(rows, key=lambda row: (names.index(row["format"]), later.get(row["keys"], 0))):
        lines.setdefault((NAMES[row["format"]], row["keys"]), {})[tokens(row)] = row
    columns = dict.fromkeys(map(tokens, rows))
    body = [[*key, *(spread(found[x]) if x in found else "" for x in columns)] for key, found in lines.items()]
    return table(["format", "keys", *columns], body)


def tokens(row: Row) -> str:
    return f"{row['prompt']}, decoded" if row["protocol"] == "window" else f"a prompt of {row['prompt']}"


def spread(row: Row) -> str:
    least, mean, most = (number(float(row[name])) for name in ("kl_low", "kl", "kl_high"))
    said = f"{mean}, {least} to {most}" if float(row["kl"]) else "0"
    return f"{said} ({float(row['perplexity']):.2f})"


def choice() -> str:
    """A format for each layer beside one for all."""
    rows = read_csv(RESULTS / CHOICE)
    kinds = {"fisher": "the closed form's", "learned": "learned", "power": "`power`"}
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["prompt"], row["level"], row["formats"]), {})[row["capacities"]] = row
    body = []
    for (prompt, level, own), found in sorted(lines.items(), key=lambda x: (-int(x[0][0]), -float(x[0][1]))):
        first, cells = found["fisher"], []
        layers = [f"{first[f'{name}_layers']} {said}" for name, said in NAMES.items() if int(first[f"{name}_layers"])]
        for kind in kinds:
            cell = number(float(found[kind]["kl"])) if kind in found else ""
            alone = [lines.get((prompt, level, name), {}).get(kind) for name in NAMES] if own == "auto" else []
            others = [row for row in alone if row is not None]
            best = min(others, key=lambda row: float(row["kl"]), default=None)
            cells.append(cell if best is None else f"{cell}, {part(found[kind], best)}")
        body.append([prompt, percent(level), f"auto: {', '.join(layers)}" if own == "auto" else NAMES[own], *cells])
    return table(["prompt", "bytes", "formats", *kinds.values()], body)


def facts() -> str:
    """What is found at a number of bytes, and in brackets the points less than the full cache finds."""
    rows = read_csv(RESULTS / FACTS)
    asked = {"aware": "in the prompt", "agnostic": "behind it"}
    found = {(row["task"], row["question"], *method(row["method"])): row for row in rows}
    body = []
    places = dict.fromkeys(key[:3] for key in found)
    for task, question, capacities in sorted(places, key=lambda key: ([*TASKS].index(key[0]), key[1] != "aware")):
        cells = [cell(found.get((task, question, capacities, name))) for name in NAMES]
        body.append([TASKS[task], asked[question], capacities, *cells])
    return table(["task", "the question", "capacities", *NAMES.values()], body)


def method(name: str) -> tuple[str, str]:
    """(capacities, format) of a method as `format_facts.py` names it."""
    whole, _, entry_format = name.partition("@")
    plan = whole.removesuffix(".json").rpartition("/")[2]
    said = {"full": "everything kept", "uniform": "equal"}.get(plan, f"learned on {plan}")
    return said, entry_format or "model"


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    said = f"{100 * float(row['score']):.1f} %"
    if not row.get("minus_low"):
        return said
    least, mean, most = (-100 * float(row[f"minus_{name}"]) + 0.0 for name in ("high", "uniform", "low"))
    return f"{said}, {mean:.1f} ({least:.1f} to {most:.1f})"


def tables() -> dict[str, Callable[[], str]]:
    """By the names of their places; those whose results are there."""
    both = partial(frontier, compared=("int8", "int4"))
    known: dict[str, tuple[str, Callable[[], str]]] = {
        "behind a prompt": (PROMPT, partial(frontier, PROMPT)),
        "window rule": (WINDOW, partial(frontier, WINDOW)),
        "behind a prompt, second model": (SECOND_PROMPT, partial(both, SECOND_PROMPT)),
        "window rule, second model": (SECOND_WINDOW, partial(both, SECOND_WINDOW)),
        "facts": (FACTS, facts),
        "keys with a bias": (CENTRE, partial(centres, CENTRE)),
        "longer contexts": (LONG, partial(centres, LONG)),
        "auto": (CHOICE, choice),
    }
    return {name: made for name, (file, made) in known.items() if (RESULTS / file).exists()}


def page(text: str) -> str:
    """The page with its tables as the results are."""
    return PLACE.sub(lambda found: found[1] + "\n" + tables()[found[2]]() + "\n" + found[3], text)


def main(check: bool) -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if not check:
            path.write_text(page(text), encoding="utf-8")
        elif page(text) != text:
            sys.exit(f"{path.relative_to(DOCS.parent)} is not what the results say: python docs/make_formats.py")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
