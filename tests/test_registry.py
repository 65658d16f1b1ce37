"""The registry: discovery with isolation, conflicts, targets, parameters."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from kvpolicy.budget.plan import policy_of
from kvpolicy.cache import RaggedStore
from kvpolicy.cache.schedule import unlimited
from kvpolicy.errors import PluginConflictError, PluginError, PluginWarning
from kvpolicy.model.spec import Budget, Importance
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.hookspecs import PROJECT, Register, hookimpl
from kvpolicy.plugins.registry import PluginRow, Registry, registry
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy
from tests.cache.play import spec_of


@dataclass(frozen=True, slots=True)
class FlatAllocator(BudgetAllocator):
    strength: float = 1.0
    steps: tuple[int, ...] = (1, 2)
    mode: Literal["a", "b"] = "a"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError("strength must be >= 0")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        return torch.ones(budget.shape)


@dataclass(frozen=True, slots=True)
class OtherAllocator(FlatAllocator):
    pass


@dataclass(frozen=True, slots=True)
class ThirdAllocator(FlatAllocator):
    pass


def entry(distribution: str, load: Callable[[], Any], name: str = "main", version: str = "1.2") -> Any:
    return SimpleNamespace(name=name, load=load, dist=SimpleNamespace(name=distribution, version=version))


def plugin(distribution: str, offer: Callable[[Register], None], name: str = "main") -> Any:
    module = ModuleType(f"plugin_{name}")

    @hookimpl
    def kvpolicy_register(register: Register) -> None:
        offer(register)

    module.kvpolicy_register = kvpolicy_register  # type: ignore[attr-defined]
    return entry(distribution, lambda: module, name)


def allocator(distribution: str, target: object, name: str = "flat", replace: bool = False) -> Any:
    return plugin(distribution, lambda register: register.allocator(name, target, replace=replace))  # type: ignore[arg-type]


def make(*entries: Any) -> Registry:
    return Registry(lambda: entries)


def rows(registry: Registry) -> list[tuple[str, str, str, str]]:
    return [(row.role, row.name, row.distribution, row.status) for row in registry.rows()]


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(PluginError) as caught:
        call()
    return str(caught.value)


def raising(error: BaseException) -> Callable[..., Any]:
    def load(*args: object) -> Any:
        raise error

    return load


# Lookup


def test_nothing_is_discovered_before_the_first_lookup() -> None:
    calls = []
    registry = Registry(lambda: calls.append(1) or [allocator("acme", FlatAllocator)])
    assert calls == []
    assert registry.names("allocator") == ["flat"]
    assert registry.get("allocator", "flat") is FlatAllocator
    assert calls == [1]


def test_rows_hold_what_a_plugin_said() -> None:
    offer = plugin("acme", lambda r: r.allocator("flat", FlatAllocator, summary="All alike.", paper="arXiv:1"))
    expected = PluginRow("allocator", "flat", "acme", "1.2", "ok", None, "All alike.", "arXiv:1")
    assert make(offer).rows() == [expected]
    more = plugin("acme", lambda r: r.allocator("flat", FlatAllocator, when="For a start."))
    assert [row.when for row in make(more).rows()] == ["For a start."]


def test_every_built_in_method_says_what_it_does_and_when_to_use_it() -> None:
    built_in = [row for row in registry.rows() if row.distribution == PROJECT]
    assert len(built_in) > 25 and all(row.summary and row.when.endswith((".", "?")) for row in built_in)


def test_every_built_in_method_is_usable_as_its_row_says() -> None:
    for row in (row for row in registry.rows() if row.distribution == PROJECT):
        assert row.status == "ok" and registry.get(row.role, row.name), row  # type: ignore[call-overload]


def test_the_targets_of_others_are_imported_for_their_rows() -> None:
    (row,) = make(plugin("acme", lambda r: r.allocator("flat", "nowhere.at_all:Flat"))).rows()
    assert row.status == "broken" and "nowhere" in str(row.error)


def test_unknown_name_lists_close_matches_and_the_command() -> None:
    message = error_of(lambda: make(allocator("acme", FlatAllocator)).get("allocator", "flatt"))
    for part in ("no allocator named 'flatt'", "did you mean 'flat'", "there is 'flat'", "`kvpolicy plugins`"):
        assert part in message


def test_unknown_name_without_any_plugin_says_what_to_install() -> None:
    assert "is kvpolicy installed" in error_of(lambda: make().get("policy", "streaming"))


def test_unknown_role_lists_the_roles() -> None:
    message = error_of(lambda: make().get("allocators", "flat"))  # type: ignore[call-overload]
    assert "'estimator', 'allocator', 'policy'" in message


def test_lookup_from_inside_a_plugin_is_refused_and_isolated() -> None:
    registry = make(plugin("acme", lambda register: print(registry.names("policy"))))
    with pytest.warns(PluginWarning, match="while plugins register"):
        assert registry.names("policy") == []


# Isolation


@pytest.mark.parametrize("failure", [ImportError("no module named x"), SystemExit(3), KeyError("x")])
def test_broken_import_is_one_warning_and_one_row(failure: BaseException) -> None:
    registry = make(entry("acme", raising(failure)), allocator("good", FlatAllocator))
    with pytest.warns(PluginWarning, match="'acme'") as caught:
        assert registry.get("allocator", "flat") is FlatAllocator
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        assert rows(registry) == [("allocator", "flat", "good", "ok"), ("", "main", "acme", "broken")]
    assert type(failure).__name__ in str(registry.rows()[1].error)


def test_half_registered_plugin_leaves_nothing() -> None:
    def offer(register: Register) -> None:
        register.allocator("half", FlatAllocator)
        raise RuntimeError("then it fell over")

    registry = make(plugin("acme", offer), allocator("good", FlatAllocator))
    with pytest.warns(PluginWarning, match="then it fell over"):
        assert registry.names("allocator") == ["flat"]


def test_wrong_hook_argument_is_isolated() -> None:
    module = ModuleType("wrong")

    @hookimpl
    def kvpolicy_register(registre: Register) -> None: ...

    module.kvpolicy_register = kvpolicy_register  # type: ignore[attr-defined]
    registry = make(entry("acme", lambda: module), allocator("good", FlatAllocator))
    with pytest.warns(PluginWarning, match="registre"):
        assert registry.names("allocator") == ["flat"]


def test_warnings_as_errors_leave_a_usable_registry() -> None:
    registry = make(entry("acme", raising(ImportError("x"))), allocator("good", FlatAllocator))
    with pytest.raises(PluginWarning):  # the test run turns warnings into errors
        registry.names("allocator")
    assert registry.names("allocator") == ["flat"]


def test_unknown_hook_is_reported_and_the_rest_works() -> None:
    offer = allocator("acme", FlatAllocator)
    module = offer.load()
    module.kvpolicy_setup = lambda: None
    registry = make(offer)
    with pytest.warns(PluginWarning, match="kvpolicy_setup is no hook"):
        assert registry.get("allocator", "flat") is FlatAllocator
    assert rows(registry) == [("allocator", "flat", "acme", "ok"), ("", "kvpolicy_setup", "acme", "broken")]


def test_marked_function_of_another_name_is_reported() -> None:
    module = ModuleType("wrong")
    module.register = hookimpl(lambda register: None)  # type: ignore[attr-defined]
    with pytest.warns(PluginWarning, match="register is no hook"):
        make(entry("acme", lambda: module)).names("policy")


def test_unmarked_hook_is_broken_and_says_the_decorator() -> None:
    module = ModuleType("unmarked")
    module.kvpolicy_register = lambda register: None  # type: ignore[attr-defined]
    with pytest.warns(PluginWarning, match="@kvpolicy.hookimpl"):
        assert rows(make(entry("acme", lambda: module))) == [("", "main", "acme", "broken")]


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (lambda r: None, "registers nothing"),
        (lambda r: r.policy("a:b", "m:C"), "'a:b' is not allowed"),
        (lambda r: r.policy("a", "m.C"), "expected 'package.module:Class'"),
        (lambda r: [r.policy("a", "m:C"), r.policy("a", "m:D")], "registered twice"),
    ],
)
def test_bad_registration_breaks_its_plugin(offer: Callable[[Register], None], reason: str) -> None:
    with pytest.warns(PluginWarning, match=reason):
        assert rows(make(plugin("acme", offer))) == [("", "main", "acme", "broken")]


def test_two_entry_points_of_one_distribution_cannot_share_a_name() -> None:
    first = plugin("acme", lambda r: r.allocator("flat", FlatAllocator), "a")
    second = plugin("acme", lambda r: r.allocator("flat", OtherAllocator), "b")
    registry = make(second, first)
    with pytest.warns(PluginWarning, match="already offered by entry point 'a'"):
        assert registry.get("allocator", "flat") is FlatAllocator


# Conflicts


def test_builtin_wins_and_the_qualified_name_works() -> None:
    registry = make(allocator("acme", OtherAllocator), allocator("kvpolicy", FlatAllocator))
    assert registry.get("allocator", "flat") is FlatAllocator
    assert registry.get("allocator", "kvpolicy:flat") is FlatAllocator
    assert registry.get("allocator", "acme:flat") is OtherAllocator
    assert registry.names("allocator") == ["acme:flat", "flat"]
    assert [status for *_, status in rows(registry)] == ["ok", "shadowed"]


def test_replace_takes_a_builtin_name_over() -> None:
    registry = make(allocator("acme", OtherAllocator, replace=True), allocator("kvpolicy", FlatAllocator))
    assert registry.get("allocator", "flat") is OtherAllocator
    assert registry.get("allocator", "kvpolicy:flat") is FlatAllocator
    assert [status for *_, status in rows(registry)] == ["replaced", "ok"]


@pytest.mark.parametrize("with_builtin", [False, True])
def test_two_third_parties_conflict_on_the_short_name(with_builtin: bool) -> None:
    pair = [allocator("acme", OtherAllocator, replace=True), allocator("beta", ThirdAllocator, replace=True)]
    registry = make(*pair, *[allocator("kvpolicy", FlatAllocator)][:with_builtin])
    with pytest.raises(PluginConflictError, match="'acme:flat', 'beta:flat'"):
        registry.get("allocator", "flat")
    assert registry.get("allocator", "beta:flat") is ThirdAllocator
    assert [status for *_, status in rows(registry)][-2:] == ["conflict", "conflict"]


def test_qualified_name_compares_distributions_as_indexes_do() -> None:
    assert make(allocator("Acme_KV", FlatAllocator)).get("allocator", "acme-kv:flat") is FlatAllocator
    message = error_of(lambda: make(allocator("acme-kv", FlatAllocator)).get("allocator", "acmekv:flat"))
    assert "did you mean 'acme-kv:flat'" in message


# KVPOLICY_PLUGINS


@pytest.mark.parametrize(("value", "loaded"), [("Acme", ["a", "k"]), ("beta, acme", ["a", "b", "k"]), ("", ["k"])])
def test_allow_list_restricts_third_parties_only(monkeypatch: Any, value: str, loaded: list[str]) -> None:
    monkeypatch.setenv("KVPOLICY_PLUGINS", value)
    registry = make(
        allocator("acme", FlatAllocator, "a"),
        allocator("beta", FlatAllocator, "b"),
        allocator("kvpolicy", FlatAllocator, "k"),
    )
    assert registry.names("allocator") == loaded
    assert len([row for row in registry.rows() if row.status == "disabled"]) == 3 - len(loaded)


def test_excluded_plugin_is_not_even_imported(monkeypatch: Any) -> None:
    monkeypatch.setenv("KVPOLICY_PLUGINS", "")
    registry = make(entry("acme", raising(AssertionError("imported"))))
    assert rows(registry) == [("", "main", "acme", "disabled")]


def test_allow_list_with_an_absent_name_warns(monkeypatch: Any) -> None:
    monkeypatch.setenv("KVPOLICY_PLUGINS", "acne")
    with pytest.warns(PluginWarning, match="KVPOLICY_PLUGINS names 'acne'"):
        make(allocator("acme", FlatAllocator)).names("allocator")


# Targets


def test_target_is_imported_at_first_use(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "late_target.py").write_text("from tests_flat import FlatAllocator as Late\n")
    monkeypatch.setitem(sys.modules, "tests_flat", SimpleNamespace(FlatAllocator=FlatAllocator))
    monkeypatch.syspath_prepend(tmp_path)
    registry = make(allocator("acme", "late_target:Late"))
    assert registry.names("allocator") == ["flat"]
    assert "late_target" not in sys.modules
    assert registry.get("allocator", "flat") is FlatAllocator
    assert sys.modules.pop("late_target")


def test_target_that_cannot_be_imported_names_its_owner() -> None:
    registry = make(allocator("acme", "no_such_module:Gone"), allocator("beta", FlatAllocator, "good"))
    message = error_of(lambda: registry.get("allocator", "flat"))
    assert "allocator 'flat' of acme 1.2" in message and "no_such_module" in message
    assert rows(registry) == [("allocator", "flat", "acme", "broken"), ("allocator", "good", "beta", "ok")]


@dataclass
class _Everything(BudgetAllocator):
    required: int
    ratio: float = float("nan")
    table: set[int] = field(default_factory=set)
    derived: int = field(default=1, init=False)
    split_scope: ClassVar[Any] = "heads"


class _NoDataclass(FlatAllocator):
    pass


@dataclass(frozen=True)
class _UnknownSource(EvictionPolicy):
    requires: ClassVar[frozenset[str]] = frozenset({"logits", "keys"})

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return torch.zeros(1)


@dataclass(frozen=True)
class _NoSinks(EvictionPolicy):
    requires: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return torch.zeros(1)


@dataclass(frozen=True)
class _NoSplit(FlatAllocator):
    split_scope: ClassVar[Any] = "model"


@dataclass(frozen=True)
class _BadDefaults(FlatAllocator):
    strength: float = -1.0


@pytest.mark.parametrize(
    ("role", "target", "parts"),
    [
        (
            "allocator",
            _Everything,
            [
                "does not implement shares",
                "not frozen",
                "'required' has no default",
                "'ratio' is nan",
                "'table' is set()",
                "'derived' has init=False",
                "`split_scope` is 'heads'",
            ],
        ),
        ("allocator", _NoDataclass, ["not a dataclass"]),
        ("allocator", _NoSplit, ["'model' but `split` is not implemented"]),
        ("allocator", _BadDefaults, ["strength must be >= 0"]),
        ("allocator", _NoSinks, ["no subclass of kvpolicy.BudgetAllocator", "register.policy"]),
        ("allocator", FlatAllocator(), ["not a class"]),
        ("policy", dict, ["no subclass of kvpolicy.EvictionPolicy", "not a dataclass"]),
        ("policy", _UnknownSource, ["lists 'logits'", "'window_attention'"]),
        ("policy", _NoSinks, ["num_sink_tokens"]),
    ],
)
def test_refused_target_says_all_that_is_wrong(role: Any, target: Any, parts: list[str]) -> None:
    registry = make(plugin("acme", lambda register: getattr(register, role)("bad", target)))
    message = error_of(lambda: registry.get(role, "bad"))
    assert f"{role} 'bad' of acme 1.2" in message
    for part in parts:
        assert part in message
    assert rows(registry) == [(role, "bad", "acme", "broken")]


# Parameters


def test_create_takes_params_from_json() -> None:
    registry = make(allocator("acme", FlatAllocator))
    assert registry.create("allocator", "flat") == FlatAllocator()
    params = {"strength": 2, "steps": [3], "mode": "b", "limit": 4}
    assert registry.create("allocator", "flat", params) == FlatAllocator(2, (3,), "b", 4)
    assert registry.create("allocator", "flat", {"limit": None}) == FlatAllocator()


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"strenght": 1.0}, ["no parameter 'strenght'", "did you mean 'strength'"]),
        ({"strength": "1"}, ["'strength' is '1', expected float"]),
        ({"strength": True}, ["expected float"]),
        ({"strength": float("inf")}, ["expected float"]),
        ({"limit": 1.5}, ["expected int | None"]),
        ({"mode": "c"}, ["'mode' is 'c'"]),
        ({"strength": -1.0}, ["FlatAllocator refuses", "strength must be >= 0"]),
        ({"strenght": 1, "mode": 3}, ["'strenght'", "'mode' is 3"]),
    ],
)
def test_create_refuses_wrong_params_and_lists_the_fields(params: dict[str, Any], parts: list[str]) -> None:
    message = error_of(lambda: make(allocator("acme", FlatAllocator)).create("allocator", "flat", params))
    for part in [*parts, "allocator 'flat' of acme 1.2", "strength = 1.0, steps = (1, 2), mode = 'a', limit = None"]:
        assert part in message


# The installed plugins


def test_builtin_sets_come_through_the_entry_points() -> None:
    code = (
        "import sys, kvpolicy; from kvpolicy.plugins.registry import registry\n"
        "assert not any(name.startswith('kvpolicy_ba') for name in sys.modules), 'a plugin was imported'\n"
        "print(registry.get('policy', 'streaming').__module__, registry.create('allocator', 'uniform'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["kvpolicy_baselines.streaming", "UniformAllocator()"]


# Many, and what they say of themselves


def test_many_registrations_cost_what_they_are() -> None:
    def steps(count: int) -> int:
        made = make(plugin("acme", lambda r: [r.policy(f"p{i}", "a:b") for i in range(count)] and None))
        calls = 0

        def count_line(*_: Any) -> Any:
            nonlocal calls
            calls += 1
            return count_line

        sys.settrace(count_line)
        try:
            assert len(made.names("policy")) == count
        finally:
            sys.settrace(None)
        return calls

    steps(1)
    assert steps(400) < 3 * steps(200)


@dataclass(frozen=True, slots=True)
class _Says(EvictionPolicy):
    num_sink_tokens: int = 4
    recent_window: int = 0
    observation_window: int = 32
    attention_power: float = 1.0
    repeat_chunk: int = 2048
    new_entry_score: float = 0.0  # type: ignore[misc]  # a field in the place of a constant

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"num_sink_tokens": -1}, "`num_sink_tokens` is -1, expected an int >= 0"),
        ({"recent_window": -5}, "`recent_window` is -5, expected an int >= 0"),
        ({"recent_window": 10**30}, "`recent_window` is 1000000000000000000000000000000, expected an int >= 0"),
        ({"observation_window": 0}, "`observation_window` is 0, expected an int >= 1"),
        ({"attention_power": 0.0}, "`attention_power` is 0.0, expected a finite number above 0"),
        ({"repeat_chunk": 0}, "`repeat_chunk` is 0, expected an int >= 1"),
    ],
)
def test_what_an_object_says_of_itself_holds(params: dict[str, Any], said: str) -> None:
    offer = plugin("acme", lambda register: register.policy("says", _Says))
    assert make(offer).create("policy", "says", {"recent_window": 7}) == _Says(recent_window=7)
    assert said in error_of(lambda: make(offer).create("policy", "says", params))
    assert said in error_of(lambda: policy_of(None, _Says(**params)))
    assert said in error_of(lambda: RaggedStore(spec_of(), unlimited((1, 2)), _Says(**params)))


def test_an_object_that_says_nan_is_refused() -> None:
    assert "`new_entry_score` is nan" in error_of(lambda: policy_of(None, _Says(new_entry_score=float("nan"))))


def test_a_property_that_fails_is_a_fault_of_its_owner() -> None:
    @dataclass(frozen=True, slots=True)
    class Exiting(_Says):
        @property
        def requires(self) -> frozenset[str]:  # type: ignore[override]
            raise SystemExit(0)

    assert "Exiting, which is not registered: SystemExit: 0" in error_of(lambda: policy_of(None, Exiting()))


def test_what_is_no_name_is_refused() -> None:
    assert "expected the name of a policy or a kvpolicy.EvictionPolicy, got 7" in error_of(lambda: policy_of(None, 7))  # type: ignore[arg-type]
