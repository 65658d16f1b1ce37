"""Plan files: round trip, every damage named, and the capacities that follow."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.budget.plan import (
    BudgetPlan,
    PlanChoice,
    PlanLevel,
    PlanMethod,
    PlanModel,
    kept_fractions,
    load_plan,
    save_plan,
)
from kvpolicy.cache import RaggedStore
from kvpolicy.errors import BudgetError, PlanError, PlanWarning, PluginError
from kvpolicy.files.fields import MAX_BYTES
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.model.spec import Importance, ModelSpec
from kvpolicy.plugins.registry import registry

FULL = LayerSpec("full", 4, 2, 16, 16)
SLIDING = LayerSpec("sliding", 4, 2, 16, 16, window=8)
SPEC = ModelSpec("mine", 64, 100, 4096, "{}", (FULL, SLIDING, FULL, FULL))
SHARES = {0.25: [[0.25, 0.25], [0.1, 0.4], [0.5, 0.0]], 0.5: [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]}


def make_plan(*retentions: float, context_length: int = 1000) -> BudgetPlan:
    levels = tuple(
        PlanLevel(r, torch.tensor(SHARES[r], dtype=torch.float64), {"exponent": 0.5}, {"search": 9.0, "heldout": 9.5})
        for r in retentions or SHARES
    )
    return BudgetPlan(
        model=PlanModel.from_spec(SPEC, "owner/mine", "main"),
        method=PlanMethod(PlanChoice("cosine"), PlanChoice("baklava"), PlanChoice("streaming", {"num_sink_tokens": 4})),
        importance=Importance(torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), torch.tensor([1.0, 2.0, 3.0])),
        levels=levels,
        provenance={"context_length": context_length, "seed": 0, "note": "[ two  blanks ]"},
    )


def with_comparison() -> BudgetPlan:
    plan = make_plan(0.25)
    level = plan.levels[0]
    comparison = {"interval": [-0.02, -0.01], "verdict": "better than uniform", "test": "paired bootstrap"}
    level = PlanLevel(level.retention, level.shares, level.allocator_params, level.perplexity, comparison)
    return BudgetPlan(plan.model, plan.method, plan.importance, (level,), plan.provenance)


def set_at(document: Any, path: str, value: Any) -> None:
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in steps:
        document = document[step]
    if value is ...:
        del document[last]
    else:
        document[last] = value


def deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("plan", [make_plan(), with_comparison(), BudgetPlan.from_capacities(SPEC, [[9, 9]] * 3)])
def test_save_and_load_give_the_same_plan(plan: BudgetPlan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json()
    assert (again.model, again.method) == (plan.model, plan.method)
    assert all(torch.equal(a.shares, b.shares) for a, b in zip(again.levels, plan.levels, strict=True))
    assert os.listdir(tmp_path) == ["plan.json"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_plan_survives_json(data: st.DataObject) -> None:
    retention = data.draw(st.floats(1e-3, 1.0))
    weights = data.draw(st.lists(st.floats(0, 1e300), min_size=6, max_size=6))
    shares = kept_fractions(torch.tensor(weights, dtype=torch.float64).reshape(3, 2), retention)
    scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.floats(-1e9, 1e9)
    values = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8)
    params = data.draw(st.dictionaries(st.text(), values, max_size=3))
    plan = make_plan()
    level = PlanLevel(retention, shares, params, {"heldout": 1.5}, {"verdict": "worse than uniform"})
    plan = BudgetPlan(plan.model, plan.method, plan.importance, (level,), {"free": params})
    again = BudgetPlan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False)))
    assert again.to_json() == plan.to_json()
    assert torch.equal(again.levels[0].shares, shares)


@settings(max_examples=300, deadline=None)
@given(
    weights=st.lists(st.just(0.0) | st.floats(0, 1e300), min_size=1, max_size=12),
    retention=st.floats(1e-3, 1.0),
)
def test_kept_fractions_have_the_mean_and_the_order(weights: list[float], retention: float) -> None:
    proportions = torch.tensor([weights], dtype=torch.float64)
    shares = kept_fractions(proportions, retention)
    assert float(shares.mean()) == pytest.approx(retention, abs=1e-9)
    assert 0 <= float(shares.min()) <= float(shares.max()) <= 1
    order = proportions[0].argsort(stable=True)
    assert bool((shares[0][order].diff() >= 0).all())


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("format", "other", "format is 'other'"),
    ("format", ..., "format is missing"),
    ("version", 2, "version is 2, expected 1"),
    ("version", True, "version is True"),
    ("version", ..., "version is missing"),
    ("model", ..., "model is missing"),
    ("model", [], "model is a list, expected an object"),
    ("model/id", 5, "model.id is 5, expected a text"),
    ("model/revision", 5, "model.revision is 5"),
    ("model/config_sha256", ..., "model.config_sha256 is missing"),
    ("model/num_layers", "4", "model.num_layers is '4', expected a whole number"),
    ("model/num_layers", True, "model.num_layers is True"),
    ("model/num_layers", 4.0, "model.num_layers is 4.0"),
    ("model/num_kv_heads", 0, "model.num_kv_heads is 0"),
    ("model/head_dim", 10**30, "model.head_dim is 1000"),
    ("model/budgeted_layers", 3, "model.budgeted_layers is 3, expected a list"),
    ("model/budgeted_layers", [], "model.budgeted_layers is empty"),
    ("model/budgeted_layers", [0, 0, 2], r"model.budgeted_layers\[1\] is 0"),
    ("model/budgeted_layers", [0, 2, 4], r"model.budgeted_layers\[2\] is 4"),
    ("model/budgeted_layers", [0, 2, -1], r"model.budgeted_layers\[2\] is -1"),
    ("method", None, "method is null"),
    ("method/policy", ..., "method.policy is missing"),
    ("method/estimator", "cosine", "method.estimator is 'cosine', expected an object"),
    ("method/policy/name", ..., "method.policy.name is missing"),
    ("method/policy/params", [], "method.policy.params is a list"),
    ("method/policy/params/num_sink_tokens", -1, "method.policy.params.num_sink_tokens is -1"),
    ("method/policy/params/num_sink_tokens", 1.5, "method.policy.params.num_sink_tokens is 1.5"),
    ("importance/per_head", ..., "importance.per_head is missing"),
    ("importance/per_head/1/0", -1.0, r"importance per_head .* index \[1, 0\] is -1"),
    ("importance/per_head/1/0", None, r"importance.per_head\[1\]\[0\] is null"),
    ("importance/per_layer", [1.0], "importance.per_layer has 1 items, expected 3"),
    ("importance/per_layer/2", 1e39, "importance per_layer must be finite"),
    ("levels", {}, "levels is an object, expected a list"),
    ("levels", [], "levels is empty"),
    ("levels/0", 1, r"levels\[0\] is 1, expected an object"),
    ("levels/0/retention", 0.0, r"levels\[0\].retention is 0.0"),
    ("levels/0/retention", 1.5, r"levels\[0\].retention is 1.5"),
    ("levels/0/retention", ..., r"levels\[0\].retention is missing"),
    ("levels/0/retention", "0.3", r"levels\[0\].retention is '0.3', expected a number"),
    ("levels/0/retention", 0.26, r"levels\[0\].shares have the mean 0.25, expected the level's retention 0.26"),
    ("levels/1/retention", 0.25, r"levels\[1\].shares have the mean"),
    ("levels/0/shares", ..., r"levels\[0\].shares is missing"),
    ("levels/0/shares", [[0.25, 0.25]], r"levels\[0\].shares has 1 rows, expected 3"),
    ("levels/0/shares/2", [0.5], r"levels\[0\].shares\[2\] has 1 items, expected 2"),
    ("levels/0/shares/2/1", -0.1, r"levels\[0\].shares\[2\]\[1\] is -0.1"),
    ("levels/0/shares/2/0", 1.01, r"levels\[0\].shares\[2\]\[0\] is 1.01"),
    ("levels/0/shares/2/0", "0.5", r"levels\[0\].shares\[2\]\[0\] is '0.5'"),
    ("levels/0/shares/2/0", True, r"levels\[0\].shares\[2\]\[0\] is True"),
    ("levels/0/shares/2/0", 10**400, r"levels\[0\].shares\[2\]\[0\] is 1000.*, expected a finite number"),
    ("levels/0/shares/2/0", float("nan"), r"levels\[0\].shares\[2\]\[0\] is nan"),
    ("levels/0/shares/2/0", float("inf"), r"levels\[0\].shares\[2\]\[0\] is inf"),
    ("levels/0/allocator_params", 3, r"levels\[0\].allocator_params is 3"),
    ("levels/0/perplexity/search", "low", r"levels\[0\].perplexity.search is 'low'"),
    ("levels/0/perplexity/search", -1, r"levels\[0\].perplexity.search is -1"),
    ("levels/0/perplexity/search", float("inf"), r"levels\[0\].perplexity.search is inf"),
    ("levels/0/comparison", {"interval": [0.0, float("nan")]}, r"levels\[0\].comparison.interval\[1\] is nan"),
    ("provenance", [], "provenance is a list"),
    ("provenance/context_length", "long", "provenance.context_length is 'long'"),
    ("provenance/unknown", float("nan"), "provenance.unknown is nan"),
    ("provenance/unknown", deep(80), "nested deeper than 64"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_FIELDS)
def test_a_bad_field_is_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    document = copy.deepcopy(make_plan().to_json())
    set_at(document, path, value)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(file)
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_level_that_stands_twice_is_named() -> None:
    document = make_plan(0.25).to_json()
    document["levels"].append(document["levels"][0])
    with pytest.raises(PlanError, match=r"levels\[1\].retention is 0.25, which levels\[0\] has already"):
        BudgetPlan.from_json(document)


BAD_FILES: list[tuple[bytes, str]] = [
    (b"", "the file is empty"),
    (b"  \n", "the file is empty"),
    (b"{", "not complete JSON at line 1 column 2"),
    (b"\x80\x04\x95", "byte 0 is not UTF-8"),
    (b"not json", "not complete JSON"),
    (b"[]", "the plan is a list, expected an object"),
    (b"null", "the plan is null"),
    (b'{"format": 1, "format": 2}', "field 'format' stands twice"),
    (b"[" * 200_000, "nested deeper"),
    (b"[" + b"9" * 10_000 + b"]", "holds a number that cannot be read"),
    (json.dumps(make_plan().to_json()).encode()[:-40], "not complete JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_damaged_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        load_plan(file)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_damage_never_crashes(data: st.DataObject) -> None:
    document = make_plan().to_json()
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(st.sampled_from([None, True, -1, 0, 2.5, 1e308, float("nan"), "", "x", [], {}, [[]], [1]]))
    try:
        plan = BudgetPlan.from_json(document)
    except PlanError:
        return
    assert BudgetPlan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_a_file_too_large_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    with open(file, "wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(PlanError, match="larger than 8 MiB"):
        load_plan(file)


def test_unknown_fields_are_ignored() -> None:
    document = make_plan().to_json()
    document["future"] = {"x": [1, 2]}
    document["levels"][0]["future"] = None
    document["model"]["future"] = "x"
    assert BudgetPlan.from_json(document).to_json() == make_plan().to_json()


def test_missing_optional_fields_are_filled() -> None:
    document = make_plan().to_json()
    for name in ("importance", "provenance"):
        del document[name]
    del document["method"]["estimator"], document["method"]["policy"]["params"]
    for level in document["levels"]:
        del level["allocator_params"], level["perplexity"], level["comparison"]
    plan = BudgetPlan.from_json(document)
    assert plan.importance is None
    assert plan.method.estimator is None
    assert int(plan.capacities(100, retention=0.5).min()) == 5, "the sink tokens of streaming by default, and one more"


@pytest.mark.parametrize(
    ("place", "reason"),
    [("missing/plan.json", "No such file"), (".", "directory"), ("file/plan.json", "Not a directory")],
)
def test_an_unwritable_path_is_named(place: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PlanError, match=rf"{place}.*{reason}|{tmp_path}.*{reason}"):
        save_plan(make_plan(), tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / place)


def test_a_failed_write_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    save_plan(make_plan(0.25), file)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(PlanError, match=r"the plan was not saved: cannot write .*plan.json: No space left"):
        save_plan(make_plan(0.5), file)
    assert load_plan(file).retentions == (0.25,)
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    save_plan(make_plan(), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert load_plan(tmp_path / "real.json").retentions == (0.25, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: BudgetPlan(p.model, p.method, None, ()), "levels is empty"),
        (lambda p: BudgetPlan(p.model, p.method, Importance(torch.ones(1, 2)), p.levels), "importance.per_head has"),
        (lambda p: BudgetPlan(p.model, p.method, None, p.levels, {"x": {1, 2}}), "provenance.x is of type set"),
        (lambda p: BudgetPlan(p.model, p.method, None, p.levels, {1: 2}), "has the key 1"),
        (lambda p: BudgetPlan(p.model, p.method, None, (PlanLevel(0.5, torch.ones(1, 1)),)), r"levels\[0\].shares has"),
    ],
)
def test_a_plan_in_python_is_checked_too(change: Callable[[BudgetPlan], BudgetPlan], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        change(make_plan())


def test_capacities_follow_the_shares_exactly() -> None:
    table = make_plan().capacities(1000, retention=0.25)
    assert table.dtype == torch.int64
    assert int(table.sum()) == 1500
    # the head with share 0 gets the floor of four sink tokens and one, which all others give up
    assert table.tolist() == [[249, 249], [100, 399], [498, 5]]


def test_levels_are_interpolated_up_to_everything() -> None:
    plan = make_plan()
    shares = torch.tensor(SHARES[0.5], dtype=torch.float64)
    torch.testing.assert_close(plan.shares_at(0.5), shares)
    torch.testing.assert_close(plan.shares_at(0.75), (shares + 1) / 2)
    torch.testing.assert_close(plan.shares_at(0.375), (shares + torch.tensor(SHARES[0.25], dtype=torch.float64)) / 2)
    assert bool((plan.shares_at(1.0) == 1).all())
    assert plan.capacities(77, retention=1.0).tolist() == [[77, 77]] * 3


@settings(max_examples=300, deadline=None)
@given(
    retention=st.floats(0.25, 1.0),
    context_length=st.integers(1, 4000),
    tp_size=st.sampled_from([1, 2]),
)
def test_the_total_is_exact_and_ranks_are_balanced(retention: float, context_length: int, tp_size: int) -> None:
    table = make_plan().capacities(context_length, retention, tp_size=tp_size)
    floor = min(5, context_length)
    assert int(table.sum()) == max(round(retention * context_length * 6), 6 * floor)
    assert floor <= int(table.min()) <= int(table.max()) <= context_length
    if tp_size == 2:
        ranks = table.sum(0)
        assert abs(int(ranks[0] - ranks[1])) <= 1


def test_retention_is_asked_for_when_there_are_several_levels() -> None:
    assert int(make_plan(0.5).capacities(100).sum()) == 300
    with pytest.raises(PlanError, match=r"several levels \(0.25, 0.5\)"):
        make_plan().capacities(100)


def test_below_the_lowest_level() -> None:
    plan = make_plan()
    with pytest.raises(PlanError, match=r"retention 0.1 is below .* it has 0.25, 0.5"):
        plan.capacities(1000, retention=0.1)
    with pytest.warns(PlanWarning, match="below the plan's lowest level, retention 0.25") as caught:
        table = plan.capacities(1000, tokens=100)
    assert len(caught) == 1
    assert table.tolist() == [[99, 99], [40, 159], [198, 5]]


def test_tokens_within_the_levels_do_not_warn() -> None:
    plan = make_plan()
    assert int(plan.capacities(1000, tokens=500).sum()) == 3000
    assert int(plan.capacities(1001, tokens=250).sum()) == 1500
    assert plan.capacities(100, tokens=4000).tolist() == [[100, 100]] * 3
    assert int(plan.capacities(np.int64(1000), tokens=torch.tensor(500)).sum()) == 3000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"context_length": 0}, BudgetError, "context_length is 0"),
        ({"context_length": 10.5}, BudgetError, "context_length is 10.5"),
        ({"context_length": True}, BudgetError, "context_length is True"),
        ({"retention": 0.0}, PlanError, "retention is 0.0"),
        ({"retention": 1.1}, PlanError, "retention is 1.1"),
        ({"retention": float("nan")}, PlanError, "retention is nan"),
        ({"retention": "half"}, PlanError, "retention is 'half'"),
        ({"tokens": 0}, BudgetError, "tokens is 0"),
        ({"tokens": 5, "retention": 0.5}, BudgetError, "give one"),
        ({"retention": 0.5, "tp_size": 3}, BudgetError, "tp_size is 3, expected a divisor of the model's 2 KV heads"),
        ({"retention": 0.5, "tp_size": 0}, BudgetError, "tp_size is 0"),
    ],
)
def test_arguments_that_cannot_be_honoured(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan().capacities(**{"context_length": 100, **arguments})


def test_a_context_far_longer_than_the_search_warns() -> None:
    plan = make_plan(context_length=100)
    assert int(plan.capacities(400, retention=0.5).sum()) == 1200
    with pytest.warns(PlanWarning, match="401 tokens is over four times the 100"):
        plan.capacities(401, retention=0.5)


def test_the_model_must_fit() -> None:
    plan = make_plan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.check_model(SPEC)
    other = ModelSpec("mine", 64, 100, 4096, "{}", (LayerSpec("full", 8, 4, 32, 32),) * 4)
    with pytest.raises(PlanError) as caught:
        plan.check_model(other)
    for part in (
        "num_kv_heads is 2 in the plan, 4 in the model",
        "head_dim is 16 in the plan, 32",
        "num_q_heads",
        "[0, 2, 3]",
    ):
        assert part in str(caught.value)
    assert "num_layers is" not in str(caught.value)
    with pytest.warns(PlanWarning, match="config_sha256 differs"):
        plan.check_model(ModelSpec("mine", 64, 101, 4096, "{}", SPEC.layers))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda t: torch.tensor(t, dtype=torch.float32)])
def test_a_table_of_ones_own(kind: Callable[[Any], Any]) -> None:
    table = [[100, 200], [300, 4096], [5, 1000]]
    plan = BudgetPlan.from_capacities(SPEC, kind(table), model_id="me")
    assert plan.capacities(4096).tolist() == table
    assert plan.model.id == "me"
    assert int(plan.capacities(8192).sum()) == 2 * sum(map(sum, table))


@settings(max_examples=200, deadline=None)
@given(
    table=st.lists(st.lists(st.integers(5, 700), min_size=2, max_size=2), min_size=3, max_size=3),
    context_length=st.integers(700, 200_000),
)
def test_ones_own_table_comes_back_exactly(table: list[list[int]], context_length: int) -> None:
    plan = BudgetPlan.from_capacities(SPEC, table, context_length)
    assert BudgetPlan.from_json(plan.to_json()).capacities(context_length).tolist() == table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[1, 2], [3]], "no table of numbers"),
        ("text", "no table of numbers"),
        (None, "no table of numbers"),
        ([[9, 9]], r"shape \(1, 2\), expected \(layers, KV heads\) = \(3, 2\)"),
        ([[9, 9], [9, 4], [9, 9]], "layer 1, KV head 1 is 4, expected a whole number from 5"),
        ([[9, 9], [9, 9], [9, 5000]], "layer 2, KV head 1 is 5000, .* to 4096"),
        ([[9, 9], [9.5, 9], [9, 9]], "layer 1, KV head 0 is 9.5"),
        ([[9, 9], [float("nan"), 9], [9, 9]], "layer 1, KV head 0 is nan"),
        (torch.ones(3, 2, dtype=torch.bool), "holds torch.bool"),
    ],
)
def test_a_table_that_cannot_be_honoured(table: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        BudgetPlan.from_capacities(SPEC, table)


def test_a_table_for_another_policy() -> None:
    plan = BudgetPlan.from_capacities(SPEC, [[5, 6]] * 3, policy="snapkv")
    assert plan.method.policy == PlanChoice("snapkv")
    assert plan.capacities(4096).tolist() == [[5, 6]] * 3
    with pytest.raises(PluginError, match="there is no policy named 'snapk'"):
        BudgetPlan.from_capacities(SPEC, [[5, 6]] * 3, policy="snapk")


@pytest.mark.parametrize("policy", [*registry.names("policy"), PlanChoice("snapkv", {"num_sink_tokens": 7})], ids=str)
def test_a_table_below_the_floor_of_its_policy(policy: Any) -> None:
    """The sink tokens that a policy has by default count as well as those that the plan names."""
    choice = PlanChoice(policy) if isinstance(policy, str) else policy
    floor = registry.create("policy", choice.name, choice.params).num_sink_tokens + 1
    with pytest.raises(BudgetError, match=rf"layer 1, KV head 0 is {floor - 1}, expected a whole number from {floor} "):
        BudgetPlan.from_capacities(SPEC, [[9, 9], [floor - 1, 9], [9, 9]], policy=policy)
    plan = BudgetPlan.from_capacities(SPEC, [[floor, 9], [9, 9], [9, 9]], 64, policy=policy)
    assert plan.capacities(64, retention=plan.retentions[0]).tolist() == [[floor, 9], [9, 9], [9, 9]]


def test_a_context_below_the_floor_takes_no_table() -> None:
    with pytest.raises(BudgetError, match=r"is 3, expected a whole number from 5 \(sink tokens \+ 1\) to 3 \(context_"):
        BudgetPlan.from_capacities(SPEC, [[3, 3]] * 3, 3, policy="streaming")


def test_a_plan_promises_what_its_cache_allows() -> None:
    """Also where a level's shares are below the floor, and the file leaves the policy's parameters out."""
    document = BudgetPlan.from_capacities(SPEC, [[5, 9]] * 3, 64, policy="streaming").to_json()
    document["levels"][0] |= {"shares": [[0.01, 0.03]] * 3, "retention": 0.02}
    plan = BudgetPlan.from_json(document)
    assert plan.num_sink_tokens == 4
    store = RaggedStore.from_plan(plan, context_length=64)
    for layer in range(3):
        store.prefill(layer, torch.zeros(1, 4, 40, 16), torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16))
    assert (
        plan.capacities(64).tolist() == store.capacities[:, 0].tolist() == store.lengths[:, 0].tolist() == [[5, 5]] * 3
    )


def test_a_plan_for_a_policy_that_is_not_here_can_be_looked_at() -> None:
    document = BudgetPlan.from_capacities(SPEC, [[5, 9]] * 3, 64).to_json()
    document["method"]["policy"] = {"name": "nobody's", "params": {"num_sink_tokens": 2}}
    plan = BudgetPlan.from_json(document)
    assert plan.num_sink_tokens == 2
    assert plan.capacities(64).tolist() == [[5, 9]] * 3
    with pytest.raises(PluginError, match="there is no policy named"):
        RaggedStore.from_plan(plan)
