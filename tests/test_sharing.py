"""Plans that are shared: in a directory, and on a Hub."""

import json
import os
import re
from pathlib import Path

import pytest

from kvpolicy import BudgetPlan, PlanError, load_plan
from kvpolicy.budget.plan_card import plan_card
from kvpolicy.verbs.validate import validate
from tests.fake_hub import fake_hub, use_hub

PLANS = Path(__file__).parents[1] / "plans"


@pytest.fixture(scope="module")
def hub():
    with fake_hub() as server:
        yield server


@pytest.fixture
def shell(hub, kvpolicy, tmp_path, monkeypatch):
    """shell(*arguments): the command line, whose Hub is that of this machine."""
    use_hub(monkeypatch, hub.url, tmp_path / "cache")

    def call(*arguments, token="hf_right"):
        monkeypatch.setenv("HF_TOKEN", token)
        return kvpolicy(*arguments)

    return call


def test_a_directory_gives_the_plan_back(tuned, tmp_path):
    plan = load_plan(tuned[0])
    assert plan.push_to_hub(tmp_path / "shared") == ""
    assert sorted(os.listdir(tmp_path / "shared")) == ["README.md", "plan.json"]
    assert BudgetPlan.from_pretrained(tmp_path / "shared").sha256 == plan.sha256


def test_the_card_is_made_of_the_plans_own_figures(tuned):
    plan = load_plan(tuned[0])
    card = plan_card(plan, "me/plans")
    for level in plan.levels:
        figures = [f"{level.perplexity[key]:.3f}" for key in ("heldout", "heldout_uniform", "heldout_full")]
        assert f"| {100 * level.retention:.4g} % | {' | '.join(figures)} |" in card
        assert level.comparison["verdict"] in card
    assert f"sha256 of the plan: {plan.sha256}" in card and "kvpolicy pull me/plans" in card


def test_a_hostile_name_is_nothing_but_text_in_the_card(tuned, tmp_path):
    document = json.loads(tuned[0].read_text())
    document["model"]["id"] = 'a/b"\nlicense: mit\n---\n<script>x</script> ![i](http://x)'
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    card = plan_card(load_plan(path), "me/x")
    assert "<script" not in card.split("---")[-1] and "\nlicense" not in card
    assert [line for line in card.splitlines() if line == "---"] == ["---", "---"]


def test_a_hub_gives_the_very_plan_back(shell, hub, tuned, tmp_path):
    plan = load_plan(tuned[0])
    first = shell("push", tuned[0], "me/plans", "--json")
    assert first.code == 0, first.err
    commit = first.json["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    hub.commit("me/plans", {"plan.json": b'{"format": "another"}'})
    hub.asked.clear()
    out = tmp_path / "got.json"
    got = shell("pull", "me/plans", "--revision", commit, "--out", out, "--json")
    assert got.code == 0, got.err
    assert load_plan(out).sha256 == plan.sha256 and got.json["commit"] == commit
    assert all("/resolve/" in line and line.endswith("/plan.json") for line in hub.asked), "nothing else is fetched"
    newest = shell("pull", "me/plans", "--out", tmp_path / "newest.json")
    assert newest.code == 2 and "format is 'another'" in newest.err, "what is no plan is refused"
    assert not (tmp_path / "newest.json").exists()


def test_what_the_hub_refuses_is_one_line(shell, tuned, tmp_path):
    for arguments, token, said in [
        (("push", tuned[0], "me/other"), "hf_wrong", "cannot write to me/other"),
        (("pull", "me/nobody", "--out", tmp_path / "x.json"), "hf_right", "cannot fetch plan.json of me/nobody"),
    ]:
        refused = shell(*arguments, token=token)
        assert refused.code == 2 and len(refused.errors) == 1 and said in refused.errors[0], refused.err


def test_a_plan_that_is_there_is_not_overwritten(kvpolicy, refused, tuned, tmp_path):
    shared, out = tmp_path / "shared", tmp_path / "plan.json"
    assert kvpolicy("push", tuned[0], shared).code == 0
    assert kvpolicy("pull", shared, "--out", out).code == 0
    assert kvpolicy("pull", shared, "--out", out).code == 0, "the same once more"
    document = json.loads(out.read_text())
    document["provenance"]["seed"] = 5
    out.write_text(json.dumps(document))
    assert "is another plan already" in refused("pull", shared, "--out", out)


def test_a_directory_without_a_plan_is_refused(refused, tmp_path):
    assert "No such file" in refused("pull", tmp_path / "none", "--out", tmp_path / "x.json")
    (tmp_path / "plan.json").write_text("{" * 100_000)
    with pytest.raises(PlanError, match="no plan from"):
        BudgetPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in PLANS.glob("*/plan.json")))
def test_plans_of_the_repository_are_sound_and_have_evidence(folder):
    plan = BudgetPlan.from_pretrained(PLANS / folder)
    assert validate(PLANS / folder / "plan.json").warnings == ()
    assert (PLANS / folder / "README.md").read_text(encoding="utf-8") == plan_card(plan, f"plans/{folder}")
    assert f"]({folder}/README.md)" in (PLANS / "README.md").read_text(encoding="utf-8")
    evidence = (PLANS / folder / "evidence.md").read_text(encoding="utf-8")
    page, anchor = re.search(r"\]\(\.\./\.\./(.*?)#(.*?)\)", evidence).groups()
    (rows,) = re.findall("`(bench.*?)`", evidence)
    assert f"# {anchor.replace('-', ' ')}" in (PLANS.parent / page).read_text(encoding="utf-8").lower()
    assert list(PLANS.parent.glob(rows.rstrip("/")))
