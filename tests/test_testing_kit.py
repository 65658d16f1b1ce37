"""The conformance kit: right plugins pass, and each law catches a plugin that breaks it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.model.spec import Budget, Importance
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.decode_step import DecodeStep
from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator, ModelProbe, Trial
from kvpolicy.plugins.source_table import NEED_CACHE, SOURCES
from kvpolicy.testing import (
    LawError,
    RecordingTrial,
    SyntheticProbe,
    check_allocator,
    check_estimator,
    check_eviction_policy,
)
from kvpolicy.testing.later_chunk import LaterChunk, in_slots
from kvpolicy.testing.laws import tensors_of


def message(check: Callable[[], None]) -> str:
    with pytest.raises(AssertionError) as caught:
        check()
    assert isinstance(caught.value, LawError)
    return str(caught.value)


# The synthetic probe


def test_probe_supplies_every_source_that_needs_no_cache() -> None:
    seen: list[int] = []

    def visit(activations: LayerActivations) -> None:
        seen.append(activations.layer)
        assert activations.supplied().keys() == supplied | {"layer"}

    supplied = SOURCES - {"scores", "capacity", "repeat_attention", "decode_attention"}
    SyntheticProbe(lengths=(9, 12)).observe(visit, supplied)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_probe_fields_fit_each_other() -> None:
    probe = SyntheticProbe()
    x = probe.activations(1, requires=SOURCES, batch_size=2, length=10)
    assert x.hidden_before is not None and x.hidden_after is not None and x.output is not None
    assert x.output_weight is not None and x.window_attention is not None and x.full_attention is not None
    projected = x.output.transpose(1, 2).flatten(2) @ x.output_weight.T
    torch.testing.assert_close(x.hidden_after - x.hidden_before, projected)
    assert x.output.shape == (2, 6, 10, 8) and x.full_attention.shape == (2, 2, 10)
    torch.testing.assert_close(x.full_attention.sum(), torch.tensor(2.0 * 6 * 10))  # each query's mass is 1
    torch.testing.assert_close(x.window_attention.sum(), torch.tensor(2.0 * 6 * 8))
    assert x.query_attention is not None and x.query_attention.shape == (2, 2, 8, 10)
    torch.testing.assert_close(x.query_attention.sum(2), x.window_attention)
    assert x.scores is not None and x.scores.tolist() == torch.zeros(2, 2, 10).tolist()


def test_probe_gives_only_what_is_required_and_the_same_twice() -> None:
    first, second = (SyntheticProbe(seed=3).activations(0, requires=frozenset({"keys"})) for _ in range(2))
    assert first.supplied().keys() == second.supplied().keys() == {"layer", "keys"}
    torch.testing.assert_close(first.keys, second.keys, rtol=0, atol=0)
    other = SyntheticProbe(seed=4).activations(0, requires=frozenset({"keys"})).keys
    assert not torch.equal(first.keys, other)


@pytest.mark.parametrize("source", ["scores", "capacity", "repeat_attention", "decode_attention"])
def test_probe_refuses_what_only_a_cache_has(source: str) -> None:
    with pytest.raises(PluginError, match=f"cannot supply \\['{source}'\\]"):
        SyntheticProbe().observe(lambda _: None, frozenset({source}))


def test_probe_runs_prompts_of_an_estimator() -> None:
    probe, seen = SyntheticProbe(), []

    def visit(activations: LayerActivations) -> None:
        seen.append((activations.values[0, :, :, 0].clone(), activations.window_attention.sum()))

    ids = probe.tokenize("the same words the same")
    assert len(ids) == 5 and ids[:2].equal(ids[3:]) and int(ids.max()) < probe.spec.vocab_size
    probe.observe(
        visit, frozenset({"keys", "values", "window_attention"}), prompts=[ids, ids[:2]], observation_window=2
    )
    assert [x.shape[1] for x, _ in seen] == [5, 5, 5, 2, 2, 2]
    for values, mass in seen:
        torch.testing.assert_close(values[:, -2:], values[:, :2])  # equal tokens have equal values, wherever they stand
        torch.testing.assert_close(mass, torch.tensor(2.0 * 6))
    with pytest.raises(PluginError, match="at least 1"):
        probe.observe(visit, frozenset({"keys"}), observation_window=0)


def test_probe_runs_its_calibration_prompts_unless_it_is_given_others() -> None:
    probe = SyntheticProbe(lengths=(9, 12))
    runs: list[list[Tensor]] = [[], []]
    for run, prompts in zip(runs, (None, probe.prompts), strict=True):

        def visit(activations: LayerActivations, run: list[Tensor] = run) -> None:
            run.append(activations.keys.clone())

        probe.observe(visit, frozenset({"keys"}), prompts=prompts)
    assert [len(prompt) for prompt in probe.prompts] == [9, 12]
    assert all(map(torch.equal, *runs))
    alone = probe.activations(1, requires=frozenset({"keys"}), length=12, seed=1).keys
    assert alone is not None and torch.equal(alone, runs[0][4])


def test_a_probe_without_prompts_or_a_tokenizer_says_so() -> None:
    class Bare(ModelProbe):
        spec, context_length = SyntheticProbe().spec, 64

        def observe(self, visit: Any, requires: Any, *, prompts: Any = None, observation_window: int = 32) -> None: ...

        def loss(self, capacities: Tensor) -> Tensor: ...

    with pytest.raises(PluginError, match="Bare does not show its calibration prompts"):
        _ = Bare().prompts
    with pytest.raises(PluginError, match="Bare has no tokenizer, and was asked for the tokens of 'a text'"):
        Bare().tokenize("a text")
    with pytest.raises(PluginError, match="Bare has no soft_loss"):
        Bare().soft_loss(lambda layer, q_pos, kv_pos: q_pos)


def test_probe_loss_falls_with_each_capacity() -> None:
    probe = SyntheticProbe()
    base = torch.full(probe.spec.table_shape, 10)
    assert probe.loss(base).shape == (2,) and probe.loss(base).dtype == torch.float64
    for index in range(base.numel()):
        more = base.clone().flatten()
        more[index] += 1
        assert bool((probe.loss(more.reshape(base.shape)) < probe.loss(base)).all())
    with pytest.raises(BudgetError, match="sink tokens"):
        probe.loss(base * 0)
    with pytest.raises(BudgetError, match="shape"):
        probe.loss(base[:1])


def test_soft_loss_of_a_hard_bias_is_the_loss() -> None:
    probe, capacities = SyntheticProbe(), torch.tensor([[5, 9], [20, 64], [33, 12]])

    def window(layer: int, rank: Tensor) -> Tensor:
        seen = rank < (capacities[layer] - 4)[:, None, None]
        return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))

    text = probe.soft_loss(window, "text")
    torch.testing.assert_close(text.double(), probe.loss(capacities), rtol=0, atol=1e-6)
    above = probe.loss(capacities) - probe.loss(torch.full((3, 2), 64))
    torch.testing.assert_close(probe.soft_loss(window).double(), above, rtol=0, atol=1e-6)
    assert torch.equal(probe.soft_loss(window, sequence=1), probe.soft_loss(window)[1:])
    with pytest.raises(PluginError, match="target"):
        probe.soft_loss(window, "half")  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="2 sequences, from 0; got 2"):
        probe.soft_loss(window, sequence=2)
    with pytest.raises(PluginError, match=r"layer 0 has shape \[2, 64\]"):
        probe.soft_loss(lambda layer, rank: torch.zeros(2, rank.shape[2]))


# Estimators


@dataclass(frozen=True, slots=True)
class KeyEstimator(ImportanceEstimator):
    """Right: mean absolute key. The wrong ones below differ in one line."""

    requires: ClassVar[frozenset[str]] = frozenset({"keys"})

    def estimate(self, probe: ModelProbe) -> Importance:
        rows: dict[int, Tensor] = {}

        def visit(activations: LayerActivations) -> None:
            rows[activations.layer] = self.reduce(activations)

        probe.observe(visit, self.requires)
        return self.result(torch.stack([rows[layer] for layer in sorted(rows)]))

    def reduce(self, activations: LayerActivations) -> Tensor:
        return activations.keys.abs().mean((0, 2, 3))

    def result(self, table: Tensor) -> Any:
        return Importance(per_head=table, per_layer=table.mean(1))


def test_right_estimator_passes_as_class_and_as_instance() -> None:
    check_estimator(KeyEstimator)
    check_estimator(KeyEstimator(), probe=SyntheticProbe(seed=5))


def estimator(reduce: Any = KeyEstimator.reduce, result: Any = KeyEstimator.result, **extra: Any) -> type[KeyEstimator]:
    body = {"reduce": reduce, "result": result, "__annotations__": {}, **extra}
    return dataclass(frozen=True)(type("Wrong", (KeyEstimator,), body))


def _kept_reference(self: object, activations: LayerActivations) -> Tensor:
    return activations.keys[0, :, 0, 0]


def _in_place(self: object, activations: LayerActivations) -> Tensor:
    return activations.keys.abs_().mean((0, 2, 3))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (estimator(reduce=_in_place), "`keys` of layer 0 was changed in place"),
        (estimator(reduce=_kept_reference), "must be finite"),
        (estimator(reduce=lambda s, a: a.values.mean()), "nobody supplied 'values': list it in `requires`"),
        (estimator(reduce=lambda s, a: torch.rand(a.keys.shape[1])), "same for the same arguments"),
        (estimator(reduce=lambda s, a: a.keys.abs().mean((0, 2, 3)).double()), "float32"),
        (estimator(result=lambda s, t: t), "returns an Importance"),
        (estimator(result=lambda s, t: Importance(t[:, :1])), "per_head has shape [L, H]"),
        (estimator(result=lambda s, t: Importance(torch.ones(3, 2))), "not from constants"),
        (estimator(result=lambda s, t: Importance(t, curves=t[..., None])), "curve_capacities [K] go together"),
        (
            estimator(result=lambda s, t: Importance(t, None, t[..., None], torch.arange(2))),
            "curve_capacities [K] go together",
        ),
        (
            estimator(result=lambda s, t: Importance(t, None, -t[..., None], torch.arange(1))),
            "curves must be finite and >= 0",
        ),
        (estimator(result=lambda s, t: Importance(t, None, t[..., None].expand(-1, -1, 2), torch.ones(2))), "ascend"),
        (estimator(num_forwards=lambda s, spec, prompts, sequences: 1), "runs at most num_forwards(spec, prompts=2"),
        (estimator(requires=frozenset({"decode_attention"})), "cannot supply ['decode_attention']"),
        (estimator(requires=frozenset({"scores"})), "cannot supply ['scores']"),
        (estimator(requires=frozenset({"logits"})), "`requires` lists 'logits'"),
    ],
)
def test_wrong_estimator_is_caught(wrong: type[KeyEstimator], law: str) -> None:
    assert law in message(lambda: check_estimator(wrong))


def test_message_says_law_input_result_and_advice() -> None:
    text = message(lambda: check_estimator(estimator(result=lambda s, t: Importance(t[:, :1]))))
    lines = text.splitlines()
    assert lines[0].startswith("Wrong() breaks a law: importance per_head has shape [L, H] = [3, 2]")
    assert lines[1] == "  given: a model of 3 layers with 2 KV heads, 3 query heads to each"
    assert lines[2].startswith("  got:   [3, 1] float32 [")
    assert lines[3].startswith("  to do: take the sizes from the arguments")


# Allocators


@dataclass(frozen=True, slots=True)
class PowerAllocator(BudgetAllocator):
    """Right, with a search and a run-time split."""

    split_scope: ClassVar[Any] = "model"
    exponent: float = 1.0
    mode: str = "plain"
    steps: int = 3

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        return importance.per_head**self.exponent

    def split(self, scores: Sequence[Tensor], budget: Budget) -> Tensor:
        return torch.stack([finite_mean(score) for score in scores], dim=1)

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        return cls(
            trial.suggest_float("exponent", 0.1, 4.0, log=True),
            trial.suggest_categorical("mode", ["plain", "other"]),
            trial.suggest_int("steps", 1, 5),
        )


def test_right_allocator_passes() -> None:
    check_allocator(PowerAllocator)
    check_allocator(PowerAllocator(2.0))


def test_recording_trial_answers_and_records() -> None:
    for pick, answers in (
        ("low", {"exponent": 0.1, "mode": "plain", "steps": 1}),
        ("high", {"exponent": 4.0, "mode": "other", "steps": 5}),
        ("default", {"exponent": 1.0, "mode": "plain", "steps": 3}),
    ):
        trial = RecordingTrial(pick, {"exponent": 1.0, "mode": "plain", "steps": 3})  # type: ignore[arg-type]
        assert PowerAllocator.suggest(trial) == PowerAllocator(**answers)
        assert trial.answers == answers


def allocator(**body: Any) -> type[PowerAllocator]:
    return dataclass(frozen=True)(type("Wrong", (PowerAllocator,), {"__annotations__": {}, **body}))


def shares(function: Callable[[Importance, Budget], object]) -> type[PowerAllocator]:
    return allocator(shares=lambda self, importance, budget: function(importance, budget))


def finite_mean(scores: Tensor) -> Tensor:
    """Mean over the entries that compete: +inf is kept in any case, -inf is absent."""
    return scores.masked_fill(~scores.isfinite(), 0).mean(-1)


def split(function: Callable[[Sequence[Tensor]], object]) -> type[PowerAllocator]:
    return allocator(split=lambda self, scores, budget: function(scores))


def suggest(function: Callable[[type, Trial], object]) -> type[PowerAllocator]:
    return allocator(suggest=classmethod(function))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (shares(lambda i, b: i.per_head.mean(1)), "shares has shape [L, H]"),
        (shares(lambda i, b: i.per_head.tolist()), "shares is a tensor"),
        (shares(lambda i, b: 1 / i.per_head), "shares is finite"),
        (shares(lambda i, b: i.per_head - 0.5), "shares is not negative"),
        (shares(lambda i, b: i.per_head * 0), "not all zero"),
        (shares(lambda i, b: torch.rand(b.shape)), "same for the same arguments"),
        (shares(lambda i, b: i.per_head.add_(1)), "changed `Importance.per_head`"),
        (
            shares(lambda i, b: i.per_head * b.floor.mul_(1).add_(1) if torch.is_tensor(b.floor) else i.per_head),
            "Budget.floor",
        ),
        (shares(lambda i, b: i.per_head * i.per_layer[:, None]), "shares raised TypeError"),
        (
            split(lambda s: torch.cat([finite_mean(s[-1]), finite_mean(s[-1])])[:, None]),
            "split has shape [B, l + 1, H]",
        ),
        (split(lambda s: torch.stack([finite_mean(x) - 1 for x in s], 1)), "split is not negative"),
        (split(lambda s: torch.stack([finite_mean(x) * 0 for x in s], 1)), "split is not all zero"),
        (split(lambda s: torch.stack([finite_mean(x.mul_(2)) for x in s], 1)), "changed `scores`"),
        (split(lambda s: torch.stack([x.mean(-1) for x in s], 1)), "split is finite"),
        (split(lambda s: torch.rand(2, len(s), 2)), "same for the same arguments"),
        (suggest(lambda cls, t: cls(t.suggest_float("power", 0, 1))), "'power', which is no field"),
        (suggest(lambda cls, t: cls(t.suggest_float("exponent", 2, 3))), "outside the searched range [2, 3]"),
        (suggest(lambda cls, t: cls(t.suggest_float("exponent", 0, 3, log=True))), "needs low > 0"),
        (suggest(lambda cls, t: cls(mode=t.suggest_categorical("mode", ["a"]))), "not among the choices"),
        (suggest(lambda cls, t: cls(2 * t.suggest_float("exponent", 0, 3))), "holds the answers of the trial"),
        (suggest(lambda cls, t: PowerAllocator()), "suggest returns a Wrong"),
        (
            suggest(lambda cls, t: cls(t.suggest_float("exponent", -1, 3))),
            "exponent=-1.0, mode='plain', steps=3) breaks a law",
        ),
        (allocator(split_scope="heads"), "`split_scope` is 'heads'"),
    ],
)
def test_wrong_allocator_is_caught(wrong: type[PowerAllocator], law: str) -> None:
    assert law in message(lambda: check_allocator(wrong))


def fit(function: Callable[[ModelProbe, Budget], object]) -> type[PowerAllocator]:
    return allocator(fit=lambda self, probe, importance, budget: function(probe, budget))


def test_what_is_learned_has_the_laws_of_shares() -> None:
    check_allocator(fit(lambda p, b: torch.ones(b.shape)))
    check_allocator(fit(lambda p, b: None))

    def refuse(self: BudgetAllocator, importance: Importance, budget: Budget) -> Tensor:
        raise PluginError("shares are learned from a model")

    def ones(self: BudgetAllocator, probe: ModelProbe, importance: Importance, budget: Budget) -> Tensor:
        return torch.ones(budget.shape)

    check_allocator(allocator(fit=ones, shares=refuse))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (fit(lambda p, b: torch.ones(3)), "fit has shape [L, H]"),
        (fit(lambda p, b: torch.zeros(b.shape)), "fit is not all zero"),
        (fit(lambda p, b: torch.rand(b.shape)), "fit is the same for the same arguments"),
        (fit(lambda p, b: p.nothing), "fit raised AttributeError"),  # type: ignore[attr-defined]
        (
            allocator(
                fit=lambda self, probe, importance, budget: None,
                shares=lambda self, importance, budget: torch.zeros(budget.shape),
            ),
            "shares is not all zero",
        ),
    ],
)
def test_wrong_learning_is_caught(wrong: type[PowerAllocator], law: str) -> None:
    assert law in message(lambda: check_allocator(wrong))


def test_apportioned_total_is_checked(monkeypatch: Any) -> None:
    monkeypatch.setattr("kvpolicy.testing.allocator.apportion", lambda shares, budget: budget.floors())
    assert "apportioned shares meet the total 192" in message(lambda: check_allocator(PowerAllocator))


@dataclass(frozen=True)
class _Drifting(PowerAllocator):
    def __post_init__(self) -> None:
        object.__setattr__(self, "exponent", self.exponent + 1)


def test_params_that_change_on_the_way_through_json_are_caught() -> None:
    assert "survive a plan file" in message(lambda: check_allocator(_Drifting))
    assert "survive a plan file" in message(lambda: check_allocator(PowerAllocator(mode={1})))  # type: ignore[arg-type]


# Policies


@dataclass(frozen=True, slots=True)
class RecentPolicy(EvictionPolicy):
    """Right: the window rule."""

    window_rule: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"positions"})
    num_sink_tokens: int = 4

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return activations.positions.to(torch.float32)


@dataclass(frozen=True, slots=True)
class KeyPolicy(EvictionPolicy):
    """Right: distance to the mean key of the present entries, and attention mass while decoding."""

    requires: ClassVar[frozenset[str]] = frozenset(
        {"positions", "scores", "keys", "decode_attention", "window_attention"}
    )
    num_sink_tokens: int = 0

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        present = (activations.positions >= 0)[..., None]
        mean = (activations.keys * present).sum(2, keepdim=True) / present.sum(2, keepdim=True)
        return (activations.keys - mean).norm(dim=-1)

    def score_step(self, step: DecodeStep) -> Tensor:
        return step.scores + step.attention


def test_right_policies_pass() -> None:
    check_eviction_policy(RecentPolicy)
    check_eviction_policy(RecentPolicy(num_sink_tokens=8))
    check_eviction_policy(KeyPolicy)
    check_eviction_policy(step(lambda s: s.scores - s.at_segment(s.total(s.attention) / s.lengths.clamp(min=1))))
    check_eviction_policy(step(lambda s: s.scores - s.at_segment(s.largest(s.keys)).amax(1)))


def policy(base: type = KeyPolicy, **body: Any) -> type[EvictionPolicy]:
    return dataclass(frozen=True)(type("Wrong", (base,), {"__annotations__": {}, **body}))


def prompt(function: Callable[[LayerActivations], object], base: type = KeyPolicy, **body: Any) -> type[EvictionPolicy]:
    return policy(base, score_prompt=lambda self, activations: function(activations), **body)


def step(function: Callable[[DecodeStep], object], base: type = KeyPolicy) -> type[EvictionPolicy]:
    return policy(base, score_step=lambda self, given: function(given))


def _mean_of_all(a: Any) -> Tensor:
    return (a.keys - a.keys.mean(2, keepdim=True)).norm(dim=-1)  # type: ignore[no-any-return]


def _recency_by_index(a: Any) -> Tensor:
    return torch.arange(a.positions.shape[-1]).expand(a.positions.shape).float()


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (prompt(lambda a: a.keys.norm(dim=-1).mean(1)), "score_prompt has shape [B, H, n]"),
        (prompt(lambda a: None), "score_prompt is a tensor"),
        (prompt(lambda a: a.keys.norm(dim=-1).half()), "score_prompt is float32"),
        (prompt(lambda a: a.positions.float().log()), "score_prompt is finite"),
        (prompt(lambda a: torch.rand(a.positions.shape)), "same for the same arguments"),
        (prompt(lambda a: a.keys.mul_(2).norm(dim=-1)), "changed `LayerActivations.keys`"),
        (prompt(lambda a: a.values.norm(dim=-1)), "score_prompt refuses: nobody supplied 'values'"),
        (
            prompt(lambda a: a.keys.norm(dim=-1) + a.scores),
            "score_prompt is finite",
        ),  # decoded entries have infinite ones
        (prompt(lambda a: a.query_attention.sum(2)), "score_prompt refuses: nobody supplied 'query_attention'"),
        (prompt(_mean_of_all), "absent entries (position -1) do not change the order"),
        (prompt(lambda a: -a.positions.float(), RecentPolicy), "keeps the most recent"),
        (prompt(_recency_by_index, RecentPolicy), "keeps the most recent"),
        (
            prompt(lambda a: a.keys.norm(dim=-1), window_rule=True, requires=frozenset({"keys"})),
            "keeps the most recent",
        ),
        (step(lambda s: s.scores[:-1]), "score_step has shape [R]"),
        (step(lambda s: s.scores.double()), "score_step is float32"),
        (step(lambda s: s.scores / 0), "score_step is finite"),
        (step(lambda s: torch.rand(s.scores.shape)), "same for the same arguments"),
        (step(lambda s: s.scores.add_(s.attention)), "changed `DecodeStep.scores`"),
        (step(lambda s: s.scores.view(-1, s.num_kv_heads)), "score_step has shape [R]"),
        (step(lambda s: s.segment), "score_step is float32"),
        (step(lambda s: s.missing), "score_step raised AttributeError"),
        (
            step(lambda s: s.window_attention),
            "DecodeStep has no 'window_attention'; it has layer, num_kv_heads, segment",
        ),
        (step(lambda s: None), "score_step is a tensor"),
        (step(lambda s: s.scores[s.positions >= 0]), "score_step has shape [R]"),
        (step(lambda s: s.scores + s.keys.mean()), "free rows (position -1) do not change the scores"),
        (step(lambda s: s.scores + float(s.attention.sum())), "score_step does not wait for the device"),
        (step(lambda s: s.scores + s.attention[s.positions >= 0].sum()), "score_step does not wait for the device"),
        (step(lambda s: s.scores + s.positions.nonzero().sum()), "score_step does not wait for the device"),
        (step(lambda s: -s.scores, RecentPolicy), "after a step too"),
        (policy(requires=frozenset({"attention"})), "`requires` lists 'attention'"),
        (policy(num_sink_tokens=-1, __annotations__={"num_sink_tokens": int}), "`num_sink_tokens` is -1"),
    ],
)
def test_wrong_policy_is_caught(wrong: type[EvictionPolicy], law: str) -> None:
    assert law in message(lambda: check_eviction_policy(wrong))


@dataclass(frozen=True, slots=True)
class LagBySlot(EvictionPolicy):
    """Wrong: scores a partition by the range of the next one (as LagKV, arXiv:2504.04704), and takes slots for age."""

    requires: ClassVar[frozenset[str]] = frozenset({"keys"})
    lag_size: int = 128
    num_sink_tokens: int = 16

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        return self.lagged(activations.keys)

    def lagged(self, states: Tensor) -> Tensor:
        """`[B, H, n]`, of states `[B, H, n, D]` in order of age. What has no partition behind it stays."""
        scores = torch.full(states.shape[:3], 1e4)
        count = (states.shape[2] - self.num_sink_tokens) // self.lag_size
        if count >= 2:
            scored = slice(self.num_sink_tokens, self.num_sink_tokens + (count - 1) * self.lag_size)
            parts = states[:, :, self.num_sink_tokens :][:, :, : count * self.lag_size].unflatten(2, (count, -1))
            low, high = parts[:, :, 1:].amin(3, keepdim=True), parts[:, :, 1:].amax(3, keepdim=True)
            spread = (high - low).masked_fill(high == low, 1.0)
            scores[:, :, scored] = ((parts[:, :, :-1] - low) / spread).std(-1).flatten(2)
        return scores


@dataclass(frozen=True, slots=True)
class LagByPosition(LagBySlot):
    """Right: sorted by position first, absent entries in front, where they are sink tokens."""

    requires: ClassVar[frozenset[str]] = frozenset({"keys", "positions"})

    def score_prompt(self, activations: LayerActivations) -> Tensor:
        order = activations.positions.argsort(2)
        scores = self.lagged(activations.keys.gather(2, order[..., None].expand(activations.keys.shape)))
        return torch.empty_like(scores).scatter_(2, order, scores)


def test_a_policy_that_takes_slot_order_for_age_is_caught_with_its_defaults() -> None:
    law = "the order of scores does not depend on the slots that the entries lie in"
    for wrong in (LagBySlot, LagBySlot(lag_size=8, num_sink_tokens=4)):
        said = message(lambda wrong=wrong: check_eviction_policy(wrong))
        assert law in said and "require `positions`, and sort by them" in said
    check_eviction_policy(LagByPosition)


def test_a_later_chunk_brings_queries_of_the_chunk_alone() -> None:
    later = LaterChunk(length=24, chunk=8)
    given = later.activations(policy(requires=SOURCES)(), layer=0)
    axes = {"queries": 2, "hidden_before": 1, "attention_input": 1}
    assert {name: getattr(given, name).shape[axis] for name, axis in axes.items()} == dict.fromkeys(axes, 8)
    assert [part.shape[1] for part in given.rope] == [8, 8]
    assert given.keys.shape[2] == given.query_attention.shape[3] == 24


def test_entries_in_other_slots_are_the_same_entries() -> None:
    later = LaterChunk(length=24, chunk=8)
    given = later.activations(policy(requires=SOURCES)(), layer=0)
    moved = in_slots(given, later.other_slots)
    for name in ("positions", "scores", "keys", "values", "window_attention", "full_attention", "repeat_attention"):
        for row, head in ((0, 0), (1, 1)):
            slots, one, two = later.other_slots[row, head], getattr(given, name), getattr(moved, name)
            assert torch.equal(two[row, head], one[row, head, slots])
            assert torch.equal(two[row, head, 16:], one[row, head, 16:]), "the chunk stays last"
    assert torch.equal(moved.query_attention[0, 1], given.query_attention[0, 1][:, later.other_slots[0, 1]])
    assert not torch.equal(moved.positions, given.positions)


def test_failed_assert_of_a_plugin_is_explained() -> None:
    def asserted(activations: LayerActivations) -> Tensor:
        assert activations.keys.ndim == 3
        return activations.keys

    wrong = prompt(asserted)
    assert "score_prompt raised AssertionError" in message(lambda: check_eviction_policy(wrong))


@pytest.mark.parametrize("check", [check_estimator, check_allocator, check_eviction_policy])
def test_every_check_refuses_what_the_registry_refuses(check: Any) -> None:
    class Plain:
        pass

    text = message(lambda: check(Plain))
    assert "no subclass of kvpolicy." in text and "not a dataclass" in text


def test_kit_needs_neither_pytest_nor_transformers() -> None:
    code = "import sys, kvpolicy.testing; print([n for n in ('pytest', 'transformers', 'optuna') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("source", sorted(SOURCES - {"decode_attention", "scale"}))
def test_a_policy_that_writes_into_any_source_is_caught(source: str) -> None:
    def written(activations: LayerActivations) -> Tensor:
        scores = torch.zeros(activations.positions.shape)
        for name, tensor in tensors_of(activations):
            if name.partition(".")[0] == source:
                tensor.add_(1)
        return scores

    wrong = prompt(written, requires=frozenset({source, "positions"}))
    assert f"changed `LayerActivations.{source}" in message(lambda: check_eviction_policy(wrong))


@pytest.mark.parametrize("source", sorted(SOURCES - NEED_CACHE - {"scale"}))
def test_an_estimator_that_writes_into_any_source_is_caught(source: str) -> None:
    def write(activations: LayerActivations) -> None:
        for _, tensor in tensors_of(activations):
            tensor.add_(1)

    with pytest.raises(LawError, match=rf"`{source}.*` of layer 0 was changed in place"):
        SyntheticProbe().observe(write, frozenset({source}))
