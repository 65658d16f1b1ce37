"""Whether a plan file is sound, runs here, and fits a model."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import check_format, name_of
from kvpolicy.budget.plan import BudgetPlan, load_plan, policy_of
from kvpolicy.errors import PlanWarning, PluginError
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.registry import registry


@dataclass(frozen=True, slots=True)
class SoundPlan:
    """A plan without a fault.

    sha256:          of the plan as `save_plan` writes it
    retentions:      its levels, ascending
    formats:         of the entries of each of them, "model" for the model's dtype
    checked_against: the model whose configuration it fits, None where none was given
    warnings:        what to know before it is used
    """

    plan: str
    sha256: str
    model: str
    policy: str
    retentions: tuple[float, ...]
    formats: tuple[str, ...]
    checked_against: str | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `kvpolicy validate --json` prints."""
        return asdict(self)


def validate(plan: str | Path, *, model: str | Path | None = None, revision: str | None = None) -> SoundPlan:
    """Checks a plan file, whether its policy can be made here, and whether it fits a model. No weights are read.

    plan:     a plan file
    model:    a Hub id, a directory, a .gguf file, or the built-in smollm2-135m; None: the file alone is checked
    revision: branch, tag or commit of the model on the Hub

    Raises `PlanError` for a file that is no sound plan or does not fit, `PluginError` for a policy that is not
    installed or does not take its parameters, `ModelError`.
    """
    loaded = load_plan(plan)
    policy_of(loaded)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PlanWarning)
        if model is not None:
            from kvpolicy.integrations.transformers import load_config

            spec = ModelSpec.from_config(load_config(str(model), revision=revision)).sharing(loaded.shared_layers)
            loaded.check_model(spec)
            for level in loaded.levels:
                check_format(level.entry_format, spec)
    return SoundPlan(
        plan=str(plan),
        sha256=loaded.sha256,
        model=loaded.model.id,
        policy=loaded.method.policy.name,
        retentions=loaded.retentions,
        formats=tuple(name_of(loaded.entry_format(Ask(retention))) for retention in loaded.retentions),
        checked_against=None if model is None else str(model),
        warnings=(*(str(warning.message) for warning in told), *_absent(loaded)),
    )


def _absent(plan: BudgetPlan) -> list[str]:
    """Of the plugins that made the plan, those that are not here; it runs without them."""
    lines = []
    for chosen, create in (
        (plan.method.estimator, lambda x: registry.create("estimator", x.name, x.params)),
        (plan.method.allocator, lambda x: registry.create("allocator", x.name, x.params)),
    ):
        try:
            if chosen is not None:
                create(chosen)
        except PluginError as error:
            lines.append(f"the plan runs, but it cannot be made again here: {error}")
    return lines
