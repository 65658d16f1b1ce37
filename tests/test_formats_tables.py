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
    assert sorted(places) == sorted(formats.tables())


def test_numbers(formats):
    assert [formats.number(x) for x in (0.00573, 0.0166, 0.1112)] == [".0057", ".017", ".111"]
    assert [formats.percent(x) for x in ("0.075", "0.15")] == ["7.5 %", "15 %"]
    assert formats.part({"each_kl": "1 3"}, {"each_kl": "4 4"}) == ".50 (.25 to .75)"


def shares(formats, file, policy, own, compared=("int4",)):
    """Of the best in 16 bits at 25, 15, 10 and 7.5 %."""
    *_, part = [row for row in formats.frontier(file, compared).splitlines() if f"| `{policy}` | `{own}` |" in row]
    return [float(x) for x in re.findall(r"\| (\.\d\d) \(", part)]


@pytest.mark.parametrize(
    ("file", "policy", "own", "expected"),
    [
        ("PROMPT", "snapkv", "int4", [0.3, 0.28, 0.34]),
        ("PROMPT", "expected_attention", "int4", [0.29, 0.25, 0.28]),
        ("WINDOW", "streaming", "int4", [0.24, 0.23, 0.26]),
        ("SECOND_PROMPT", "snapkv", "int4", [0.22, 0.23, 0.28]),
        ("SECOND_PROMPT", "snapkv", "int8", [0.33, 0.39, 0.48]),
        ("SECOND_WINDOW", "streaming", "int4", [0.23, 0.23, 0.26]),
        ("SECOND_WINDOW", "streaming", "int8", [0.28, 0.41, 0.49]),
    ],
)
def test_what_the_text_says_of_the_goals_is_in_the_tables(formats, file, policy, own, expected):
    """Parts of the best in 16 bits at 15, 10 and 7.5 %."""
    assert shares(formats, getattr(formats, file), policy, own, (own,))[1:] == expected
    said = ", ".join(f"{x:.2f}".removeprefix("0") for x in expected)
    assert said in (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def test_what_the_text_says_of_divergences_at_25_percent_is_in_the_tables(formats):
    first, second = formats.frontier(formats.PROMPT), formats.frontier(formats.SECOND_PROMPT)
    assert "| `snapkv` | `int4` | learned | .0045 (19.36) |" in first
    assert "| `expected_attention` | `int4` | learned | .0046 (19.38) |" in first
    assert "| `snapkv` | `int8` | learned | .0070 (23.06) |" in second
    assert "| `snapkv` | `int4` | learned | .015 (23.13) |" in second


def test_what_the_text_says_of_facts_is_what_meets_the_goals(formats):
    """Points less than the full cache, at 15 % of the bytes: 5 of pass keys and 10 of key-value items."""
    rows = [x for x in formats.read_csv(formats.RESULTS / formats.FACTS) if not x["method"].startswith("full")]
    lost = {(x["question"], x["task"], x["method"]): round(-100 * float(x["minus_uniform"]), 1) for x in rows}
    goals = {"passkey": 5, "key-value": 10}
    met = {key: points for key, points in lost.items() if points <= goals[key[1]]}
    assert {key: points for key, points in met.items() if key[:2] != ("aware", "passkey")} == {
        ("agnostic", "passkey", "snapkv/novels.json@int4"): 3.2,
        ("agnostic", "key-value", "snapkv/novels.json@int4"): 7.2,
        ("agnostic", "key-value", "snapkv/novels.json@int8"): 8.2,
        ("aware", "key-value", "snapkv/novels.json@int8"): 2.0,
        ("aware", "key-value", "snapkv/novels.json@int4"): 5.5,
        ("aware", "key-value", "snapkv/answers.json@int8"): 9.8,
        ("aware", "key-value", "snapkv/answers.json@int4"): 9.8,
    }
    aware = [key for key in lost if key[:2] == ("aware", "passkey")]
    assert len(aware) == 9 and all(key in met for key in aware)


def test_what_is_said_of_a_large_bias_with_everything_kept_was_measured(formats):
    rows = formats.read_csv(formats.RESULTS / formats.SECOND_PROMPT)
    found = {row["format"]: f"{float(row['perplexity']):.2f}" for row in rows if row["capacities"] == "everything"}
    text = " ".join((DOCS / "how-to" / "choose-a-format.md").read_text(encoding="utf-8").split())
    assert f"{found['int4']} and {found['int8']}, where the full cache has {found['model']}" in text


def test_a_later_centre_comes_behind_former_ones_whenever_it_was_measured(formats, monkeypatch, tmp_path):
    """Of each format, where its rows are added behind those of all others."""
    rows = formats.read_csv(formats.RESULTS / formats.CENTRE)
    added = [row | {"keys": "less their centre"} for row in rows if row["keys"] == "less their bias"]
    sys.modules["shared"].write_csv(tmp_path / formats.CENTRE, rows + added)
    monkeypatch.setattr(formats, "RESULTS", tmp_path)
    said = [[cell.strip() for cell in line.split("|")[1:3]] for line in formats.centres(formats.CENTRE).splitlines()]
    for name in ("`int8`", "`int4`"):
        kinds = [keys for own, keys in said if own == name]
        assert kinds[0] == "whole" and kinds[-2:] == ["less their bias", "less their centre"]
    assert [own for own, _ in said[2:]] == sorted(
        (own for own, _ in said[2:]), key=["16 bits", "`int8`", "`int4`"].index
    )


def test_a_second_model_has_tables_once_it_has_results(formats, monkeypatch, tmp_path):
    """Of the first model's rows, under another name; int8 is compared with 16 bits there too."""
    first = formats.read_csv(formats.RESULTS / formats.PROMPT)
    monkeypatch.setattr(formats, "RESULTS", tmp_path)
    assert formats.tables() == {}
    write_csv = sys.modules["shared"].write_csv
    kept = [row | {"model": "another"} for row in first if row["policy"].startswith("snapkv(")]
    write_csv(tmp_path / formats.SECOND_PROMPT, kept)
    assert [*formats.tables()] == ["behind a prompt, second model"]
    text = "<!-- formats: behind a prompt, second model -->\n<!-- formats: end -->"
    lines = formats.page(text).splitlines()
    compared = [line for line in lines if "of the best in 16 bits" in line]
    assert [line.split("|")[2].strip() for line in compared] == ["`int8`", "`int4`"]
    assert "| `snapkv` | `int4` | learned | .0045 (19.36) | .0059 (19.37) | .0096 (19.50) | .016 (19.58) |" in lines


def test_facts_say_what_is_found_and_what_the_full_cache_finds_more(formats, monkeypatch, tmp_path):
    row = {"question": "aware", "task": "key-value", "retention": 0.15, "n": 4, "bytes_of_full": 0.15}
    less = {"minus_uniform": -0.25, "minus_low": -0.5, "minus_high": 0.0}
    nothing = dict.fromkeys(less, "")
    rows = [row | {"method": "full", "score": 0.75} | nothing]
    rows += [row | {"method": "snapkv/uniform@int4", "score": 0.5} | less]
    rows += [
        row | {"method": "snapkv/answers.json@int4", "score": 0.5} | less,
        row | {"method": "full@int4", "score": 1},
    ]
    monkeypatch.setattr(formats, "RESULTS", tmp_path)
    (tmp_path / formats.FACTS).parent.mkdir()
    sys.modules["shared"].write_csv(tmp_path / formats.FACTS, rows)
    assert formats.tables()["facts"]().splitlines()[2:] == [
        "| key-value | in the prompt | everything kept | 100.0 % |  | 75.0 % |",
        "| key-value | in the prompt | equal | 50.0 %, 25.0 (0.0 to 50.0) |  |  |",
        "| key-value | in the prompt | learned on answers | 50.0 %, 25.0 (0.0 to 50.0) |  |  |",
    ]


def test_each_model_has_a_panel_of_its_own(formats, monkeypatch, tmp_path):
    plot = importlib.import_module("plot_formats")
    monkeypatch.setitem(sys.modules, "plot_formats", plot)
    rows, drawn = formats.read_csv(formats.RESULTS / formats.PROMPT), []
    write_csv = sys.modules["shared"].write_csv
    write_csv(tmp_path / "second.csv", [row | {"model": "another"} for row in rows if "snapkv(" in row["policy"]])
    given = [str(formats.RESULTS / formats.PROMPT), str(formats.RESULTS / formats.WINDOW), str(tmp_path / "second.csv")]
    monkeypatch.setattr(plot, "draw", lambda axis, rows: drawn.append({(x["model"], x["protocol"]) for x in rows}))
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "x.png"), *given])
    plot.main()
    assert drawn == [{("smollm2-135m", "prompt")}, {("smollm2-135m", "window")}, {("another", "prompt")}]
    assert (tmp_path / "x.png").exists()


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
    text = " ".join((DOCS / "how-to" / "choose-a-format.md").read_text(encoding="utf-8").split())
    for line, cache in (
        ("a token at 131072 tokens, everything kept", "kvpolicy"),
        ("the same, compiled", "kvpolicy, compiled"),
        ("a token of each of these", "kvpolicy, slots"),
    ):
        assert f"| {line} | {ms[cache, 'model']} | {ms[cache, 'int4']} |" in text
    assert f"that fit in slots, 20 % kept | {count['model']} | {count['int4']} |" in text
    speeds = [float(found["kvpolicy, slots", name]["tokens_per_second"]) for name in ("int4", "model")]
    assert f"{int(count['int4']) / int(count['model']):.1f} times the sequences" in text
    assert f"{speeds[0] / speeds[1]:.1f} times the tokens a second" in text
