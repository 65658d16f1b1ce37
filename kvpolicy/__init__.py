"""kvpolicy: measure which KV heads matter, search per-head budgets, save them as a plan."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvpolicy.apportion import apportion
from kvpolicy.cache import RaggedStore, StaticStore
from kvpolicy.errors import (
    BudgetError,
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
from kvpolicy.hookspecs import Register, hookimpl
from kvpolicy.interfaces import (
    BudgetAllocator,
    DecodeStep,
    EvictionPolicy,
    ImportanceEstimator,
    LayerActivations,
    ModelProbe,
    Rotary,
    Trial,
)
from kvpolicy.plan import BudgetPlan, load_plan, save_plan
from kvpolicy.registry import registry
from kvpolicy.spec import Budget, Importance, LayerSpec, ModelSpec

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers import (
        DecodeRunner,
        PromptProbe,
        RaggedCache,
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
    from kvpolicy.tuning import TuneSettings, tune

__version__ = "0.1.0"

_LAZY = {
    "DecodeRunner": "kvpolicy.integrations.transformers",
    "PromptProbe": "kvpolicy.integrations.transformers",
    "RaggedCache": "kvpolicy.integrations.transformers",
    "TransformersProbe": "kvpolicy.integrations.transformers",
    "TuneSettings": "kvpolicy.tuning",
    "attach": "kvpolicy.integrations.transformers",
    "attached": "kvpolicy.integrations.transformers",
    "detach": "kvpolicy.integrations.transformers",
    "generate": "kvpolicy.integrations.transformers",
    "load_cache": "kvpolicy.integrations.transformers",
    "load_model": "kvpolicy.integrations.transformers",
    "new_cache": "kvpolicy.integrations.transformers",
    "read_corpus": "kvpolicy.integrations.transformers",
    "repeat_context": "kvpolicy.integrations.transformers",
    "tune": "kvpolicy.tuning",
}


def __getattr__(name: str) -> object:
    """Names that need transformers or optuna are imported at first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvpolicy' has no attribute '{name}'")


__all__ = [
    "Budget",
    "BudgetAllocator",
    "BudgetError",
    "BudgetPlan",
    "DecodeRunner",
    "DecodeStep",
    "EvictionPolicy",
    "GraphWarning",
    "Importance",
    "ImportanceEstimator",
    "KVPolicyError",
    "LayerActivations",
    "LayerSpec",
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
    "StaticStore",
    "StudyError",
    "TextError",
    "TransformersProbe",
    "Trial",
    "TuneSettings",
    "VersionWarning",
    "apportion",
    "attach",
    "attached",
    "detach",
    "generate",
    "hookimpl",
    "load_cache",
    "load_model",
    "load_plan",
    "new_cache",
    "read_corpus",
    "registry",
    "repeat_context",
    "save_plan",
    "tune",
]
