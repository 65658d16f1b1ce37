"""The search: one Optuna study per retention, perplexity as the objective. The only importer of optuna."""

from __future__ import annotations

from kvpolicy.tuning.make_plan import tune
from kvpolicy.tuning.settings import TuneSettings

__all__ = ["TuneSettings", "tune"]
