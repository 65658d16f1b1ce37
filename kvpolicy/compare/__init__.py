"""Methods side by side: one model, one task, equal budgets, and only such claims as the intervals carry."""

from __future__ import annotations

from kvpolicy.compare.document import Comparison, load_comparison
from kvpolicy.compare.methods import Method, read_methods
from kvpolicy.compare.run import compare
from kvpolicy.compare.tasks import PasskeyTask, PerplexityTask, Task

__all__ = [
    "Comparison",
    "Method",
    "PasskeyTask",
    "PerplexityTask",
    "Task",
    "compare",
    "load_comparison",
    "read_methods",
]
