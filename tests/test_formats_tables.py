"""The tables of formats in the docs say what the committed results say, and a part of them is worked by hand."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def formats(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("make_formats", DOCS / "make_formats.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_formats", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("shared", None)


def test_the_pages_are_what_the_results_say(formats):
    places = []
    for path in formats.PAGES:
        text = path.read_text(encoding="utf-8")
        places += [found[2] for found in formats.PLACE.finditer(text)]
        assert formats.page(text) == text, "run python docs/make_formats.py"
    assert sorted(places) == sorted(formats.TABLES)


def test_numbers(formats):
    assert [formats.number(x) for x in (0.00573, 0.0166, 0.1112)] == [".0057", ".017", ".111"]
    assert [formats.percent(x) for x in ("0.075", "0.15")] == ["7.5 %", "15 %"]
    assert formats.part({"each_kl": "1 3"}, {"each_kl": "4 4"}) == ".50 (.25 to .75)"


def test_what_the_text_says_of_the_goals_is_in_the_table(formats):
    """Parts of the best in 16 bits at 15, 10 and 7.5 %, and the divergence at 25 %."""
    *_, part = [row for row in formats.frontier("prompt").splitlines() if "| `snapkv` | `int4` |" in row]
    shares = [float(x) for x in re.findall(r"\| (\.\d\d) \(", part)]
    assert shares[1:] == [0.36, 0.31, 0.35]
    assert "| `snapkv` | `int4` | learned | .0057 (19.37) |" in formats.frontier("prompt")


def test_tune_takes_the_format_that_leaves_least(formats):
    """By the loss on the calibration sequences, under the closed form's capacities: what the page says of it."""
    cases = {}
    for row in formats.read_csv(formats.RESULTS / "format_choice_cpu.csv"):
        if row["capacities"] == "fisher":
            cases.setdefault((row["prompt"], row["level"]), []).append(row)
    taken = [min(rows, key=lambda row: float(row["search_loss"])) for rows in cases.values()]
    assert [row["formats"] for row in taken] == ["int4", "auto", "auto", "int8"]
    for row, rows in zip(taken, cases.values(), strict=True):
        assert float(row["kl"]) < 1.01 * min(float(other["kl"]) for other in rows)


def test_what_is_said_of_speed_was_measured(formats):
    rows = formats.read_csv(formats.RESULTS / "decode_formats_h200.csv")
    found = {(row["cache"], row["format"]): row for row in rows}
    ms = {key: f"{float(row['ms_per_token']):.1f} ms" for key, row in found.items()}
    count = {name: found["kvpolicy, slots", name]["batch"] for name in ("model", "int4")}
    text = (DOCS / "how-to" / "choose-a-format.md").read_text(encoding="utf-8")
    for line, cache in (
        ("a token at 131072 tokens, everything kept", "kvpolicy"),
        ("the same, compiled", "kvpolicy, compiled"),
        ("a token of each of these", "kvpolicy, slots"),
    ):
        assert f"| {line} | {ms[cache, 'model']} | {ms[cache, 'int4']} |" in text
    assert f"that fit in slots, 20 % kept | {count['model']} | {count['int4']} |" in text
    speeds = [float(found["kvpolicy, slots", name]["tokens_per_second"]) for name in ("int4", "model")]
    assert f"{int(count['int4']) / int(count['model']):.1f} times\nthe sequences" in text
    assert f"{speeds[0] / speeds[1]:.1f} times the tokens a second" in text
