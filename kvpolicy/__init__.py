"""kvpolicy: measure which KV heads matter, search per-head budgets, save them as a plan."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpolicy.budget.apportion import apportion
    from kvpolicy.budget.plan import BudgetPlan, load_plan, save_plan
    from kvpolicy.cache import RaggedStore
    from kvpolicy.errors import (
        BudgetError,
        FormatWarning,
        GraphWarning,
        KVPolicyError,
        ModelError,
        ModelWarning,
        PlanError,
        PlanWarning,
        PluginConflictError,
        PluginError,
        PluginWarning,
        StudyError,
        TextError,
        VersionWarning,
    )
    from kvpolicy.integrations.transformers import (
        DecodeRunner,
        PromptProbe,
        RaggedCache,
        SlotRunner,
        TransformersProbe,
        attach,
        attached,
        detach,
        generate,
        load_cache,
        load_model,
        new_cache,
        read_corpus,
        repeat_context,
    )
    from kvpolicy.model.layer_spec import LayerSpec
    from kvpolicy.model.spec import Budget, Importance, ModelSpec
    from kvpolicy.plugins.activations import LayerActivations, LayerStatistics, Rotary
    from kvpolicy.plugins.decode_step import DecodeStep
    from kvpolicy.plugins.hookspecs import Register, hookimpl
    from kvpolicy.plugins.layer_gradients import LayerGradients
    from kvpolicy.plugins.registry import registry
    from kvpolicy.plugins.roles import BudgetAllocator, EvictionPolicy, ImportanceEstimator, ModelProbe, Trial
    from kvpolicy.plugins.task_role import Sample, Task, Turn
    from kvpolicy.plugins.wrapping import WrappingPolicy
    from kvpolicy.tuning import TuneSettings, tune
    from kvpolicy.verbs.bench import bench
    from kvpolicy.verbs.compare import compare
    from kvpolicy.verbs.estimate import estimate
    from kvpolicy.verbs.eval import eval
    from kvpolicy.verbs.profile import profile

__version__ = "0.2.0"

_LAZY = {
    "Budget": "kvpolicy.model.spec",
    "BudgetAllocator": "kvpolicy.plugins.roles",
    "BudgetError": "kvpolicy.errors",
    "BudgetPlan": "kvpolicy.budget.plan",
    "DecodeRunner": "kvpolicy.integrations.transformers",
    "DecodeStep": "kvpolicy.plugins.decode_step",
    "EvictionPolicy": "kvpolicy.plugins.roles",
    "FormatWarning": "kvpolicy.errors",
    "GraphWarning": "kvpolicy.errors",
    "Importance": "kvpolicy.model.spec",
    "ImportanceEstimator": "kvpolicy.plugins.roles",
    "KVPolicyError": "kvpolicy.errors",
    "LayerActivations": "kvpolicy.plugins.activations",
    "LayerGradients": "kvpolicy.plugins.layer_gradients",
    "LayerSpec": "kvpolicy.model.layer_spec",
    "LayerStatistics": "kvpolicy.plugins.activations",
    "ModelError": "kvpolicy.errors",
    "ModelProbe": "kvpolicy.plugins.roles",
    "ModelSpec": "kvpolicy.model.spec",
    "ModelWarning": "kvpolicy.errors",
    "PlanError": "kvpolicy.errors",
    "PlanWarning": "kvpolicy.errors",
    "PluginConflictError": "kvpolicy.errors",
    "PluginError": "kvpolicy.errors",
    "PluginWarning": "kvpolicy.errors",
    "PromptProbe": "kvpolicy.integrations.transformers",
    "RaggedCache": "kvpolicy.integrations.transformers",
    "RaggedStore": "kvpolicy.cache",
    "SlotRunner": "kvpolicy.integrations.transformers",
    "Register": "kvpolicy.plugins.hookspecs",
    "Rotary": "kvpolicy.plugins.activations",
    "Sample": "kvpolicy.plugins.task_role",
    "StudyError": "kvpolicy.errors",
    "Task": "kvpolicy.plugins.task_role",
    "TextError": "kvpolicy.errors",
    "TransformersProbe": "kvpolicy.integrations.transformers",
    "Trial": "kvpolicy.plugins.roles",
    "TuneSettings": "kvpolicy.tuning",
    "Turn": "kvpolicy.plugins.task_role",
    "VersionWarning": "kvpolicy.errors",
    "WrappingPolicy": "kvpolicy.plugins.wrapping",
    "apportion": "kvpolicy.budget.apportion",
    "attach": "kvpolicy.integrations.transformers",
    "attached": "kvpolicy.integrations.transformers",
    "bench": "kvpolicy.verbs.bench",
    "compare": "kvpolicy.verbs.compare",
    "detach": "kvpolicy.integrations.transformers",
    "estimate": "kvpolicy.verbs.estimate",
    "eval": "kvpolicy.verbs.eval",
    "generate": "kvpolicy.integrations.transformers",
    "hookimpl": "kvpolicy.plugins.hookspecs",
    "load_cache": "kvpolicy.integrations.transformers",
    "load_model": "kvpolicy.integrations.transformers",
    "load_plan": "kvpolicy.budget.plan",
    "new_cache": "kvpolicy.integrations.transformers",
    "profile": "kvpolicy.verbs.profile",
    "read_corpus": "kvpolicy.integrations.transformers",
    "registry": "kvpolicy.plugins.registry",
    "repeat_context": "kvpolicy.integrations.transformers",
    "save_plan": "kvpolicy.budget.plan",
    "tune": "kvpolicy.tuning",
}


def __getattr__(name: str) -> object:
    """Every public name is imported at its first use: `import kvpolicy` alone loads nothing, not even torch."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvpolicy' has no attribute '{name}'")


def __dir__() -> list[str]:
    """With the names that nobody has used yet, for completion."""
    return sorted({*globals(), *__all__})


__all__ = [
    "Budget",
    "BudgetAllocator",
    "BudgetError",
    "BudgetPlan",
    "DecodeRunner",
    "DecodeStep",
    "EvictionPolicy",
    "FormatWarning",
    "GraphWarning",
    "Importance",
    "ImportanceEstimator",
    "KVPolicyError",
    "LayerActivations",
    "LayerGradients",
    "LayerSpec",
    "LayerStatistics",
    "ModelError",
    "ModelProbe",
    "ModelSpec",
    "ModelWarning",
    "PlanError",
    "PlanWarning",
    "PluginConflictError",
    "PluginError",
    "PluginWarning",
    "PromptProbe",
    "RaggedCache",
    "RaggedStore",
    "Register",
    "Rotary",
    "Sample",
    "SlotRunner",
    "StudyError",
    "Task",
    "TextError",
    "TransformersProbe",
    "Trial",
    "TuneSettings",
    "Turn",
    "VersionWarning",
    "WrappingPolicy",
    "apportion",
    "attach",
    "attached",
    "bench",
    "compare",
    "detach",
    "estimate",
    "eval",
    "generate",
    "hookimpl",
    "load_cache",
    "load_model",
    "load_plan",
    "new_cache",
    "profile",
    "read_corpus",
    "registry",
    "repeat_context",
    "save_plan",
    "tune",
]
