"""What is said, with `PlanWarning`, where a plan is used otherwise than it was made."""

from __future__ import annotations

import contextlib
import warnings

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.entry_format import Format, name_of
from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.errors import PlanWarning, PluginError
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import EvictionPolicy


def warn_if_other_policy(plan: BudgetPlan, policy: EvictionPolicy) -> bool:
    """Warns where a tuned plan is used with another policy. Returns whether it did.

    A table of a user's own was tuned for no policy.
    """
    tuned, own = plan.method.policy, None
    if plan.method.allocator is None:
        return False
    with contextlib.suppress(PluginError):  # a policy that is not installed here is another one
        own = registry.create("policy", tuned.name, tuned.params)
    params = plugin_call.params_of(policy)
    if own is not None and type(own) is type(policy) and plugin_call.params_of(own) == params:
        return False
    warnings.warn(
        f"the plan was tuned for the policy '{tuned.name}' {tuned.params}, but {policy!r} evicts here: the budgets "
        "may not suit it; 'kvpolicy eval' with policy= tells",
        PlanWarning,
        stacklevel=3,
    )
    return True


def warn_if_other_format(plan: BudgetPlan, ask: Ask, entry_format: Format) -> bool:
    """Warns where entries are kept in another format than a plan says of them, if it does. Returns whether it did."""
    own = plan.entry_format(ask)
    if own is None or own == entry_format:
        return False
    warnings.warn(
        f"the plan was made for entries in {name_of(own)}, but they are kept in {name_of(entry_format)} here: leave "
        "format= out for the plan's own",
        PlanWarning,
        stacklevel=3,
    )
    return True
