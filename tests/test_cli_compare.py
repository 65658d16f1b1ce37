"""`kvpolicy compare` on the command line."""

import json

import pytest

from tests.command_line import FAST

SMALL = [*FAST, "--limit", "2", "--quiet"]


@pytest.fixture
def compare(kvpolicy, tiny_checkpoint, tiny_text, tmp_path):
    def call(*arguments):
        given = [*arguments, "--model", tiny_checkpoint, "--text", tiny_text, "--out", tmp_path / "c.json"]
        return kvpolicy("compare", *given)

    return call


def test_json_table_and_picture(compare, tmp_path):
    options = ["-r", "0.5", "-r", "0.3", "--png", tmp_path / "c.png", *SMALL]
    result = compare("--methods", "tova/uniform", "streaming/pyramid", *options, "--json")
    assert (result.code, result.warnings) == (0, []), result.err
    rows = {(row["method"], row["retention"]): row for row in result.json["rows"]}
    expected = [
        "random/uniform",
        "tova/uniform",
        "streaming/uniform",
        "streaming/pyramid",
        "streaming/pyramid shuffled",
    ]
    assert list(rows) == [("full", 1.0), *((name, kept) for name in expected for kept in (0.5, 0.3))]
    for row in rows.values():
        assert row["error"] is None and row["quality"] > 1 and row["bytes"] > 0 and row["decode_ms"] > 0
        assert row["calibration"] == {"tokens": 0, "forwards": 0, "seconds": 0.0}
        assert (row["excess"] is None) == (row["method"] == "full")
        assert row["method"] == "full" or row["low"] <= row["excess"] <= row["high"]
    assert result.json["settings"]["dtype"] == "float32" and result.json["settings"]["prompt_length"] == 32
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["summary"] == result.json["rows"]
    page = (tmp_path / "c.md").read_text()
    assert page.count("\n| tova/uniform |") == 2 and "## 30 % kept" in page and "a prompt of 32 tokens" in page
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 4


def test_from_the_first_token_on(compare):
    result = compare("--methods", "streaming/pyramid", "--prefill", "0", "-r", "0.5", *SMALL, "--json", "--no-timing")
    assert result.code == 0, result.err
    failed = {row["method"]: row["error"] is not None for row in result.json["rows"]}
    assert {row["decode_ms"] for row in result.json["rows"]} == {None}
    names = ["full", "random/uniform", "streaming/uniform", "streaming/pyramid", "streaming/pyramid shuffled"]
    assert failed == {name: name == "random/uniform" for name in names}
    settings = result.json["settings"]
    assert (settings["protocol"], settings["prompt_length"]) == ("window", 64)
    refused = compare("--methods", "streaming/pyramid", "-r", "0.5", *SMALL)
    assert refused.code == 2 and "protocol was window, now prompt" in refused.err


def test_a_quantized_cache_is_drawn_too_or_says_what_it_needs(compare, tmp_path):
    result = compare("quantized/fp8", "quantized/int4", "-r", "0.5", *SMALL, "--json", "--png", tmp_path / "c.png")
    rows = {row["method"]: row for row in result.json["rows"]}
    assert result.code == (2 if any(row["error"] for row in rows.values()) else 0), result.err
    for name, missing in (("quantized/fp8", "Unknown quantization backend"), ("quantized/int4", "optimum-quanto")):
        row = rows[name]
        assert row["retention"] == 1
        assert missing in row["error"] if row["error"] else row["bytes"] < 0.6 * row["dense_bytes"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_measures_nothing_and_prints_the_table(compare):
    arguments = ["--methods", "tova", "-r", "0.5", *FAST, "--limit", "2"]
    assert "3 rows of 2 sequences to measure, 0 are in" in compare(*arguments).err
    result = compare(*arguments)
    assert "0 rows of 2 sequences to measure, 3 are in" in result.err
    assert "50 % kept" in result.out and "tova/uniform" in result.out and "bytes of this level" in result.out


@pytest.mark.parametrize("task", ["passkey", "key-value"])
def test_retrieval_needs_no_text(kvpolicy, tiny_checkpoint, tmp_path, task):
    options = ["--model", tiny_checkpoint, "--dtype", "float32", "--limit", "2", "--context", "245", "-r", "0.5"]
    result = kvpolicy("compare", "tova", "--task", task, *options, "--out", tmp_path / "p.json")
    assert result.code == 0, result.err
    assert "Nothing was found with the full cache" in result.out, "a random model finds nothing"
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["losses"] for row in rows] == [[1.0, 1.0]] * 3


RECORD = [{"retention": None, "tokens": 65_432, "forwards": 84, "seconds": 3.4}]


@pytest.mark.parametrize(
    ("record", "told"), [(None, "3 trials on 4 x 64 tokens"), (RECORD, "65.4k tokens, 84 forwards, 3 s")]
)
def test_a_tuned_plan_says_what_it_was_searched_on(kvpolicy, tuned, tiny_text, tmp_path, record, told):
    path, out = tmp_path / "plan.json", tmp_path / "c.json"
    arguments = ["--text", tiny_text, *SMALL, "-r", "0.5", "--out", out, "--json"]
    document = json.loads(tuned[0].read_text())
    document["provenance"]["calibration"] = record
    path.write_text(json.dumps(document))
    result = kvpolicy("compare", path, "--model", document["model"]["id"], *arguments)
    assert (result.code, result.warnings) == (0, []), result.err
    rows = {row["method"]: row for row in result.json["rows"]}
    assert {f"{path} shuffled", "streaming/uniform"} < set(rows)
    assert rows[str(path)]["calibration"]["trials"] == 3 and rows[str(path)]["error"] is None
    assert f"| {told} |" in out.with_suffix(".md").read_text()


def test_the_whole_of_a_text_is_for_plans_that_have_not_seen_it(kvpolicy, refused, tuned, tiny_text, tmp_path):
    plan, model = tuned[0], json.loads(tuned[0].read_text())["model"]["id"]
    arguments = ["compare", plan, "--part", "whole", "--model", model, *SMALL, "-r", "0.5"]
    seen = refused(*arguments, "--text", tiny_text, "--out", tmp_path / "seen.json")
    assert f"a plan was tuned on a part of {tiny_text.name}" in seen
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(reversed(tiny_text.read_text().split("\n\n"))))
    result = kvpolicy(*arguments, "--text", other, "--out", tmp_path / "c.json", "--json")
    assert result.code == 0, result.err
    assert result.json["about"]["text"] == "other.txt"


WRONG = {
    "": "name the methods to compare",
    "snapkw": "there is no policy named 'snapkw' (did you mean 'snapkv'?)",
    "snapkv(kernel_size=4)": "kernel_size must be odd",
    "tova --task rouge": "no task named 'rouge'; there is: perplexity, key-value, needle-grid, passkey, babilong/NAME",
    "tova -r 1": "--retention 1 keeps everything",
    "tova -r 0": "in (0, 1]; got 0",
    "tova --limit 1": "--limit",
    "tova --task passkey --prefill 9": "--prefill goes with perplexity",
    "tova --prefill 63": "must have from 1 to 62 of a sequence's 64 tokens",
    "gone.json": "gone.json",
    "quantized/int3": "no method 'quantized/int3'; there is: quantized/fp8, quantized/int4, quantized/int2",
    "tova --part search": "--part must be heldout or whole, got 'search'",
    "tova --context 6000": "give a longer text or a shorter context",
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_compared(refused, tiny_checkpoint, tiny_text, tmp_path, arguments, expected):
    model = ["--model", tiny_checkpoint, "--text", tiny_text, "--out", tmp_path / "c.json"]
    assert expected in refused("compare", *FAST, *arguments.split(), *model)
    assert not list(tmp_path.iterdir())


def test_other_settings_and_other_files_are_refused(compare, refused, tiny_checkpoint, tiny_text, tmp_path):
    assert compare("tova", "-r", "0.5", *SMALL).code == 0
    again = ["compare", "tova", "--model", tiny_checkpoint, "--text", tiny_text, *SMALL, "--out"]
    assert "was made under other settings (seed was 0, now 1): choose" in refused(
        *again, tmp_path / "c.json", "--seed", 1
    )
    (tmp_path / "x.json").write_text("{}")
    assert "x.json cannot be read as a comparison: format is missing" in refused(*again, tmp_path / "x.json")
    assert "give another name" in refused(*again, tmp_path / "c.md")
