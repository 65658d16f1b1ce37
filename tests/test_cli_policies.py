"""`tune`, `eval` and `generate` under other policies than the window rule, and plans used under another one."""

import pytest

from kvpolicy import load_plan
from tests.command_line import FAST

CONTEXT = ["--context", "128", "--dtype", "float32"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("snapkv") / "plan.json"


@pytest.fixture
def snapkv(kvpolicy, tiny_checkpoint, tiny_text, places):
    """(plan, what the run printed): tuned for snapkv, once."""
    arguments = ["tune", "--policy", "snapkv", "--model", tiny_checkpoint, "--text", tiny_text, *CONTEXT]
    options = ["--retention", "0.7", "--trials", "2", "--resume", "--out", places]
    return places, kvpolicy(*arguments, *options, "--json")


def test_tune_for_a_policy_writes_whom_it_was_tuned_for(snapkv):
    path, result = snapkv
    assert (result.code, result.warnings) == (0, []), result.err
    plan = load_plan(path)
    assert plan.method.policy.name == "snapkv" and plan.method.policy.params["kernel_size"] == 5
    shown = {name: result.json[name] for name in ("policy", "protocol", "prefill_length")}
    assert shown == {"policy": "snapkv", "protocol": "prompt", "prefill_length": 64}
    assert "the loss under snapkv: a prompt of 64 tokens is compressed once" in result.err


def test_parameters_of_the_policy_hold_in_the_search_and_under_the_plan(kvpolicy, tiny_checkpoint, tiny_text, tmp_path):
    out = tmp_path / "plan.json"
    given = ["tune", "--model", tiny_checkpoint, "--text", tiny_text, *CONTEXT, "--retention", "0.5", "--trials", "1"]
    options = ["--policy-param", "num_sink_tokens=9", "--policy-param", "recent_window=20", "--policy", "snapkv"]
    result = kvpolicy(*given, *options, "--out", out)
    assert result.code == 0, result.err
    plan = load_plan(out)
    assert (plan.method.policy.params["num_sink_tokens"], plan.method.policy.params["recent_window"]) == (9, 20)
    assert int(plan.capacities(64).min()) > 9, "sink tokens stay in every KV head"
    refused = kvpolicy(*given, "--policy", "snapkv", "--policy-param", "sinks=9", "--out", out)
    assert refused.code == 2 and "sinks" in refused.err


def test_eval_takes_policy_and_prompt_from_the_plan(kvpolicy, snapkv, tiny_text):
    path, _ = snapkv
    row = kvpolicy("eval", path, "--text", tiny_text, "--dtype", "float32", "--json").json
    level = load_plan(path).levels[0]
    assert row["perplexity"] == pytest.approx(level.perplexity["heldout"], rel=1e-6)
    assert (row["policy"], row["protocol"], row["context_length"], row["prefill_length"]) == (
        "snapkv",
        "prompt",
        128,
        64,
    )
    assert (row["entries"], row["scored_tokens"]) == (round(0.7 * 64 * 4), 8 * 64)
    assert row["dense_bytes"] == 2 * 2 * 64 * (8 + 8) * 4


@pytest.mark.parametrize(
    ("policy", "protocol", "words"),
    [
        ("streaming", "window", "measured under streaming: every token is decoded under the budget (window rule)"),
        ("l2norm", "prompt", "measured under l2norm: a prompt of 40 tokens is compressed once"),
    ],
)
def test_eval_names_its_protocol(kvpolicy, tiny_checkpoint, tiny_text, policy, protocol, words):
    arguments = ["eval", "uniform", "-r", "0.5", "--model", tiny_checkpoint, "--text", tiny_text, *CONTEXT]
    prefill = ["--prefill", "40"] if protocol == "prompt" else []
    row = kvpolicy(*arguments, *prefill, "--policy", policy, "--json").json
    assert (row["policy"], row["protocol"]) == (policy, protocol)
    assert row["entries"] == round(0.5 * (40 if prefill else 128) * 4)
    result = kvpolicy(*arguments, *prefill, "--policy", policy)
    assert words in result.out


def test_eval_full_is_the_same_for_every_policy_that_compresses_a_prompt(kvpolicy, tiny_checkpoint, tiny_text):
    arguments = ["eval", "full", "--model", tiny_checkpoint, "--text", tiny_text, *CONTEXT, "--json"]
    rows = [kvpolicy(*arguments, "--policy", policy).json for policy in ("snapkv", "random")]
    dense = kvpolicy(*arguments, "--prefill", "64").json
    assert [row["perplexity"] for row in rows] == pytest.approx([dense["perplexity"]] * 2, rel=1e-5)


def test_another_policy_than_the_plans_is_one_warning(kvpolicy, tuned, snapkv, tiny_text):
    expected = "kvpolicy: warning: the plan was tuned for the policy 'streaming'"
    result = kvpolicy("eval", tuned[0], "--policy", "h2o", "--text", tiny_text, "--json")
    assert result.code == 0 and len(result.warnings) == 1 and result.warnings[0].startswith(expected)
    assert [row["protocol"] for row in result.json] == ["prompt"] * 2
    prompt = ["--prompt", "bade bade", "--max-new-tokens", "3", "--dtype", "float32", "--json"]
    result = kvpolicy("generate", tuned[0], "--policy", "h2o", *prompt)
    assert result.code == 0 and len(result.warnings) == 1 and result.warnings[0].startswith(expected)
    assert kvpolicy("generate", snapkv[0], *prompt).warnings == []
    assert kvpolicy("generate", snapkv[0], "--policy", "snapkv", *prompt).warnings == []


WRONG = {
    "eval uniform -r 0.5 --policy snapkw": "no policy named 'snapkw' (did you mean 'snapkv'?)",
    "eval full --policy h2o --prefill 0": "must have from 1 to 62 of a sequence's 64 tokens",
    "eval full --policy h2o --prefill 63": "must have from 1 to 62 of a sequence's 64 tokens",
    "tune --policy h2o --prefill 0": "must have from 1 to 62 of a sequence's 64 tokens",
    "tune --prefill 64": "--prefill must be below the context of 64, got 64",
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.items(), ids=WRONG)
def test_a_wrong_policy_or_prompt(refused, tiny_checkpoint, tiny_text, tmp_path, arguments, expected):
    out = ["--out", tmp_path / "plan.json"] if arguments.startswith("tune") else []
    assert expected in refused(*arguments.split(), "--model", tiny_checkpoint, "--text", tiny_text, *FAST, *out)
    assert not list(tmp_path.iterdir())
