"""Budgets learned by gradient: windows with soft edges, moved until the model predicts what its full cache predicts.

No source: made for kvpolicy. The window rule is StreamingLLM's (arXiv:2309.17453); that a per-head gate is learned
by distilling the full cache into it is DuoAttention's idea (arXiv:2410.10819), which learns two kinds of heads.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy import Budget, BudgetAllocator, Importance, ModelProbe, PluginError


@dataclass(frozen=True, slots=True)
class LearnedAllocator(BudgetAllocator):
    """Shares from gradient descent on the divergence between the full cache and soft windows.

    steps:           of Adam, one sequence each
    learning_rate:   at the first step; it falls to zero along a line
    tau_start, tau_end: width of a window's edge, in units of log distance, at the first and the last step
    num_sink_tokens: first positions that every head sees; those of the policy
    seed:            of the order of the sequences
    """

    needs_importance = False

    steps: int = 140
    learning_rate: float = 0.08
    tau_start: float = 0.35
    tau_end: float = 0.05
    num_sink_tokens: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.learning_rate > 0 and self.num_sink_tokens >= 0):
            raise PluginError(
                "learned: steps must be >= 1, learning_rate > 0 and num_sink_tokens >= 0, got "
                f"{self.steps}, {self.learning_rate} and {self.num_sink_tokens}"
            )
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
        theta = torch.zeros(budget.shape, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([theta], lr=self.learning_rate)
        order, losses, begun = self._order(probe.num_sequences), [], time.monotonic()
        probe.progress.begin("learn windows", self.steps)
        try:
            for step in range(self.steps):
                done = step / max(self.steps - 1, 1)
                tau = self.tau_start * (self.tau_end / self.tau_start) ** done
                adam.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
                adam.zero_grad()
                with torch.enable_grad():
                    bias = _SoftWindows(_capacities(theta, budget), self.num_sink_tokens, tau)
                    loss = probe.soft_loss(bias, "full", sequence=order[step]).mean()
                    loss.backward()  # type: ignore[no-untyped-call]
                losses.append(_finite(float(loss.detach()), step))
                adam.step()
                left = (self.steps - step - 1) * (time.monotonic() - begun) / (step + 1)
                probe.progress.advance(f"step {step + 1}/{self.steps}, divergence {losses[-1]:.4f}, {left:.0f} s left")
        finally:
            probe.progress.end()
        probe.progress.note(_summary(losses, time.monotonic() - begun))
        return _capacities(theta.detach(), budget)

    def _order(self, count: int) -> list[int]:
        """Which sequence each step sees: all of them once, in an order drawn anew, before any comes again."""
        generator = torch.Generator().manual_seed(self.seed)
        rounds = math.ceil(self.steps / count)
        return [int(i) for _ in range(rounds) for i in torch.randperm(count, generator=generator)][: self.steps]


class _SoftWindows:
    """`logsigmoid((log(window + 1/2) - log(distance + 1)) / tau)`, 0 on sink tokens.

    As tau goes to 0 this becomes the window rule: a head sees the last `window` tokens, itself included.
    capacities: [L, H], not whole numbers; window: capacity less the sink tokens
    """

    def __init__(self, capacities: Tensor, num_sink_tokens: int, tau: float) -> None:
        self.edges = (capacities - num_sink_tokens).clamp(min=1).add(0.5).log().float()
        self.num_sink_tokens, self.tau = num_sink_tokens, tau

    def __call__(self, layer: int, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
        distance = (q_pos[:, None] - kv_pos).clamp(min=0)
        edge = self.edges[layer].to(q_pos.device)[:, None, None]
        bias = F.logsigmoid((edge - torch.log1p(distance.float())) / self.tau)
        return bias.masked_fill(kv_pos < self.num_sink_tokens, 0.0)


def _capacities(theta: Tensor, budget: Budget) -> Tensor:
    """The floors, and of what is left a part by softmax: the exact total, never under a floor."""
    floors = budget.floors().double()
    left = max(budget.total - float(floors.sum()), 0.0)
    return floors + left * torch.softmax(theta.flatten(), 0).reshape(theta.shape)


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise PluginError(
            f"learned: the divergence from the full cache is {loss} at step {step + 1}: try a lower learning_rate, or "
            "another --dtype"
        )
    return loss


def _summary(losses: list[float], seconds: float) -> str:
    """Cost and convergence, in one line. The windows get harder meanwhile, so the divergence need not fall."""
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return (
        f"learned windows in {len(losses)} steps, {seconds:.0f} s ({seconds / len(losses):.2f} s a step): divergence "
        f"from the full cache {first:.4f} at first, {last:.4f} at last"
    )
