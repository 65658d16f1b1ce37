"""Budgets learned by gradient: capacities with soft edges, moved until the model predicts what its full cache predicts.

No source: made for kvpolicy. That a per-head gate is learned
by distilling the full cache into it is DuoAttention's idea (arXiv:2410.10819), which learns two kinds of heads.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, ModelProbe, PluginError

_LEAST_IMPORTANCE = 0.02
_SAVED_STEPS = 5  # from one state that is kept to the next


@dataclass(frozen=True, slots=True)
class LearnedAllocator(BudgetAllocator):
    """Shares from gradient descent on the divergence between the full cache and soft capacities.

    steps:           of Adam, one sequence each
    learning_rate:   at the first step; it falls to zero along a line
    tau_start, tau_end: width of a capacity's edge, in units of log rank, at the first and the last step
    start_exponent:  power of the importance that the first shares are in proportion to; 0 starts from uniform
    seed:            of the order of the sequences
    """

    needs_importance = False

    steps: int = 140
    learning_rate: float = 0.08
    tau_start: float = 0.35
    tau_end: float = 0.05
    start_exponent: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.learning_rate > 0):
            raise PluginError(
                f"learned: steps must be >= 1 and learning_rate > 0, got {self.steps} and {self.learning_rate}"
            )
        if not math.isfinite(self.start_exponent):
            raise PluginError(f"learned: start_exponent must be finite, got {self.start_exponent}")
        if not self.tau_start >= self.tau_end > 0:
            raise PluginError(f"learned: expected tau_start >= tau_end > 0, got {self.tau_start} and {self.tau_end}")

    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        """Raises `PluginError`: without a model there is nothing to learn from."""
        raise PluginError(
            "learned: shares are learned from a model, one retention at a time: make a plan with "
            "'kvpolicy tune --allocator learned' and give that"
        )

    def fit(self, probe: ModelProbe, importance: Importance, budget: Budget) -> Tensor:
        """The capacities, float64 `[L, H]`, that the last step left; they sum to the budget's total."""
        theta = self._start(importance.per_head).requires_grad_()
        adam = torch.optim.Adam([theta], lr=self.learning_rate)
        num_sink_tokens, order = probe.num_sink_tokens, self.order(probe.num_sequences)
        losses, begun = _restored(probe.saved(), theta, adam), time.monotonic()
        first = len(losses)
        probe.progress.begin("learn capacities", self.steps - first)
        try:
            for step in range(first, self.steps):
                adam.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
                adam.zero_grad()
                with torch.enable_grad():
                    bias = SoftCapacities(capacities_of(theta, budget) - num_sink_tokens, self.tau(step))
                    loss = probe.soft_loss(bias, "full", sequence=order[step]).mean()
                    loss.backward()  # type: ignore[no-untyped-call]
                losses.append(_finite(float(loss.detach()), step))
                adam.step()
                if (step + 1) % _SAVED_STEPS == 0:
                    probe.save(_state(losses, theta, adam))
                left = (self.steps - step - 1) * (time.monotonic() - begun) / (step + 1 - first)
                probe.progress.advance(f"step {step + 1}/{self.steps}, divergence {losses[-1]:.4f}, {left:.0f} s left")
        finally:
            probe.progress.end()
        probe.progress.note(_summary(losses, first, time.monotonic() - begun))
        return capacities_of(theta.detach(), budget)

    def tau(self, step: int) -> float:
        """The width of the edges falls by the same factor each step."""
        return float(self.tau_start * (self.tau_end / self.tau_start) ** (step / max(self.steps - 1, 1)))

    def _start(self, importance: Tensor) -> Tensor:
        """Theta whose shares are in proportion to a power of the importance, float64 `[L, H]`."""
        best = float(importance.max())
        if best <= 0:
            return torch.zeros(importance.shape, dtype=torch.float64)
        # a head that measured nothing can still rise: it starts at a small part of the best
        return self.start_exponent * (importance.double() / best).clamp(min=_LEAST_IMPORTANCE).log()

    def order(self, count: int) -> list[int]:
        """Which sequence each step sees: all of them once, in an order drawn again, before any comes again."""
        generator = torch.Generator().manual_seed(self.seed)
        rounds = math.ceil(self.steps / count)
        return [int(i) for _ in range(rounds) for i in torch.randperm(count, generator=generator)][: self.steps]


class SoftCapacities:
    """`logsigmoid((log(kept + 1/2) - log(rank + 1)) / tau)`, 0 on entries that are never evicted.

    As tau goes to 0 this becomes what a cache does: the `kept` entries that rank first are seen, the others not.
    kept: [L, H], capacities less the sink tokens, not whole numbers
    """

    def __init__(self, kept: Tensor, tau: float) -> None:
        self.edges, self.tau = kept.clamp(min=1).add(0.5).log().float(), tau

    def __call__(self, layer: int, rank: Tensor) -> Tensor:
        edge = self.edges[layer].to(rank.device)[:, None, None]
        return F.logsigmoid((edge - torch.log1p(rank.float())) / self.tau)  # log(0) of rank -1: no bias


def capacities_of(theta: Tensor, budget: Budget) -> Tensor:
    """Float64 `[L, H]`, as theta: the floors, and of what is left a part by softmax, so the total is exact."""
    floors = budget.floors().double()
    cost = torch.ones_like(floors) if budget.cost is None else budget.cost.double()
    left = max(budget.total - float((floors * cost).sum()), 0.0)
    return floors + left * torch.softmax(theta.flatten(), 0).reshape(theta.shape) / cost


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise PluginError(
            f"learned: the divergence from the full cache is {loss} at step {step + 1}: try a lower learning_rate, or "
            "another --dtype"
        )
    return loss


def _state(losses: list[float], theta: Tensor, adam: torch.optim.Adam) -> dict[str, Any]:
    """Where learning is, as JSON values, which hold every bit of a double."""
    moments = adam.state[theta]
    tensors = {"theta": theta.detach(), "mean": moments["exp_avg"], "square": moments["exp_avg_sq"]}
    return {"losses": losses} | {name: tensor.tolist() for name, tensor in tensors.items()}


def _restored(state: dict[str, Any] | None, theta: Tensor, adam: torch.optim.Adam) -> list[float]:
    """Goes back to where an interrupted run was last kept. Returns the losses of its steps."""
    if state is None:
        return []
    learned, mean, square = (torch.tensor(state[x], dtype=torch.float64) for x in ("theta", "mean", "square"))
    with torch.no_grad():
        theta.copy_(learned)
    steps = torch.tensor(float(len(state["losses"])))
    adam.state[theta] = {"step": steps, "exp_avg": mean, "exp_avg_sq": square}
    return list(state["losses"])


def _summary(losses: list[float], before: int, seconds: float) -> str:
    """Cost and convergence, in one line. The edges get harder meanwhile, so the divergence need not fall."""
    part, taken = max(1, len(losses) // 10), len(losses) - before
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    kept = f"; {before} of the steps were taken before" if before else ""
    return (
        f"learned capacities in {len(losses)} steps, {seconds:.0f} s ({seconds / max(taken, 1):.2f} s a step){kept}: "
        f"divergence from the full cache {first:.4f} at first, {last:.4f} at last"
    )
