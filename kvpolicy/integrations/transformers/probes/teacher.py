"""Distillation: how far a model's predictions are from those of its full cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LOGIT_ROWS = 256  # turned into a divergence at a time
_TEACHER_BYTES = 1 << 30
"""Logits of the full cache are kept up to this size, over all sequences; beyond it they are computed again."""


class Teacher:
    """The full cache's logits of each sequence, `[T - first_scored, vocabulary]`."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor], sequences: Tensor) -> None:
        self.logits_of, self.sequences = logits_of, sequences
        self.kept: dict[int, Tensor] = {}

    def __call__(self, index: int, device: torch.device) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        with torch.no_grad():
            logits = self.logits_of(self.sequences[index : index + 1].to(device))[0]
        if logits.nbytes * len(self.sequences) <= _TEACHER_BYTES:
            self.kept[index] = logits
        return logits


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher || student) over rows of logits `[n, vocabulary]`, float32; gradients for the student alone."""
    parts = [
        checkpoint(_divergence_rows, targets, rows, use_reentrant=False, preserve_rng_state=False)
        for targets, rows in zip(torch.split(teacher, _LOGIT_ROWS), torch.split(student, _LOGIT_ROWS), strict=True)
    ]
    return torch.stack(parts).sum() / len(teacher)


def _divergence_rows(teacher: Tensor, student: Tensor) -> Tensor:
    expected, actual = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum()
