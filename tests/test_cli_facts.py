"""Lost facts are warned of, and the options of `tune` that go by them."""

import json

import pytest

from kvpolicy import PlanError, load_plan
from tests.command_line import FAST

HIDDEN = "perplexity alone hides lost facts"
PROMPT = ["--prompt", "ba de fi go ku " * 8, "--max-new-tokens", "2", "--device", "cpu", "--min-tokens", "8"]


@pytest.fixture
def plan_with(tuned, tmp_path):
    """plan_with(at_half, at_three_tenths): a tuned plan of these passkey scores, 0.95 with the full cache."""

    def make(*scores):
        document = json.loads(tuned[0].read_text())
        for level, score in zip(document["levels"], scores, strict=True):
            level["retrieval"] = {"passkey": {"score": score, "full": 0.95, "n": 20, "length": 64}}
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(document))
        return path

    return make


def test_show_warns_of_levels_that_lose_facts(kvpolicy, plan_with, tmp_path):
    path, page = plan_with(0.95, 0.4), tmp_path / "page.html"
    result = kvpolicy("show", path, "--html", page)
    (told,), shown = [line for line in result.warnings if HIDDEN in line], result.out
    assert f"at 30 % kept the model finds 40 % of held-out pass keys, and 95 % with the full cache: {HIDDEN}" in told
    assert "warning:" not in shown
    assert "40 of 95 %" in shown and "95 of 95 %" in shown
    assert HIDDEN in page.read_text()


def test_who_searched_for_facts_is_not_told_to(kvpolicy, plan_with):
    path = plan_with(0.95, 0.4)
    assert "or tune with --objective mixed" in kvpolicy("show", path).err
    document = json.loads(path.read_text())
    document["provenance"]["objective"] = "task:ruler/vt"
    path.write_text(json.dumps(document))
    told = kvpolicy("show", path).err
    assert HIDDEN in told and "tune with" not in told


@pytest.mark.parametrize(("score", "warns"), [(0.95, False), (0.9, False), (0.85, True), (1.0, False)])
def test_five_points_fewer_are_not_worth_a_warning(kvpolicy, plan_with, score, warns):
    assert (HIDDEN in kvpolicy("show", plan_with(0.95, score)).err) == warns


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["-r", "0.3"], "30 %"),
        (["-r", "0.4"], "30 %"),
        (["-r", "0.5"], None),
        (["-r", "0.8"], None),
        (["-r", "1"], None),
        (["--tokens", "30"], "30 %"),
        (["--tokens", "10"], "30 %"),
        ([], None),
    ],
    ids=lambda x: " ".join(x or []) if isinstance(x, list) else "",
)
def test_generate_warns_for_the_level_in_use(kvpolicy, plan_with, arguments, kept):
    result = kvpolicy("generate", plan_with(0.95, 0.4), *PROMPT, *arguments)
    assert result.code == 0
    found = [line for line in result.warnings if HIDDEN in line]
    assert [line.partition(" kept")[0].removeprefix("kvpolicy: warning: at ") for line in found] == (
        [kept] if kept else []
    )
    assert HIDDEN not in result.out


def test_old_plans_have_no_passkey_score(kvpolicy, tuned, tmp_path):
    document = json.loads(tuned[0].read_text())
    for level in document["levels"]:
        del level["retrieval"]
    for name in ("objective", "calibration", "passkey"):
        del document["provenance"][name]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    assert [level.retrieval for level in load_plan(path).levels] == [{}, {}]
    shown = kvpolicy("show", path)
    assert shown.code == 0 and "pass keys" not in shown.out and "objective" not in shown.out


@pytest.mark.parametrize(
    ("retrieval", "message"),
    [
        ({"passkey": {"score": 1.5, "full": 1.0}}, r"retrieval\.passkey\.score is 1\.5, expected a part from 0 to 1"),
        ({"passkey": {"score": "all"}}, r"retrieval\.passkey\.score is 'all', expected a number"),
        ({"passkey": 3}, r"retrieval\.passkey is 3, expected an object"),
        ({"answer_loss": {"heldout": None, "search": []}}, r"retrieval\.answer_loss\.search is a list"),
    ],
)
def test_a_damaged_score_is_named(tuned, tmp_path, retrieval, message):
    document = json.loads(tuned[0].read_text())
    document["levels"][1]["retrieval"] = retrieval
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=rf"levels\[1\]\.{message}"):
        load_plan(path)


@pytest.fixture
def tune(tiny_checkpoint, tiny_text, tmp_path):
    out = ["--out", str(tmp_path / "plan.json"), "--trials", "1"]
    return ["tune", "--model", tiny_checkpoint, "--text", tiny_text, *FAST, *out]


def test_tune_for_facts_shows_both_losses(kvpolicy, tune, tmp_path):
    options = ["--objective", "mixed", "--context", "300", "--sequences", "2", "-r", "0.5"]
    result = kvpolicy(*tune, *options)
    assert result.code == 0, result.err
    assert "2 sequences of 300 tokens and 8 needle prompts of 300 tokens" in result.err
    found = load_plan(tmp_path / "plan.json").levels[0].retrieval["answer_loss"]
    assert f"{found['heldout']:.4f}" in result.out and f"{found['heldout_full']:.4f}" in result.out
    shown = kvpolicy("show", tmp_path / "plan.json").out
    assert "answers in long prompts" in shown and "objective            mixed" in shown


def test_tune_down_to_a_limit_says_which_is_the_smallest(kvpolicy, tune, tmp_path):
    result = kvpolicy(*tune, "--max-loss", "10", "--json")
    plan = load_plan(tmp_path / "plan.json")
    assert plan.retentions == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert result.json["max_loss"] == plan.provenance["max_loss"]
    assert plan.provenance["max_loss"]["smallest"] == 0.1 and plan.provenance["max_loss"]["failed"] is None
    assert (
        "the smallest cache whose held-out loss is at most 1000 % above the full cache's: retention 0.1, " in result.err
    )


def test_tune_that_finds_nothing_within_the_limit_writes_no_plan(refused, kvpolicy, tune, tmp_path):
    message = refused(*tune, "--max-loss", "1e-9", "-r", "0.1", "-r", "0.2")
    assert "no retention keeps within --max-loss 1e-09: with 0.2 kept the held-out loss is" in message
    assert not (tmp_path / "plan.json").exists() and (tmp_path / "plan.json.study").exists()
    again = kvpolicy(*tune, "--max-loss", "10", "-r", "0.1", "-r", "0.2", "--resume")
    assert again.code == 0 and "at most 1000 % above the full cache's" in again.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--objective facts", "objective must be one of perplexity, retrieval, mixed, got 'facts'"),
        ("--max-loss 0", "--max-loss is a part of the full cache's loss, above 0"),
        ("--objective retrieval", "a prompt of 64 tokens is too short for this task: give at least"),
        ("--sequences 10000", "10000 search sequences needs"),
    ],
)
def test_a_wrong_option_is_refused(refused, tune, arguments, expected):
    assert expected in refused(*tune, *arguments.split())
