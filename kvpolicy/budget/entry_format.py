"""The format of a cache's entries by its name, and what it asks of a budget."""

from __future__ import annotations

from kvpolicy_kernels.formats import FORMATS, EntryFormat, check_dim

from kvpolicy.errors import BudgetError
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.plugins.roles import EvictionPolicy

MODEL = "model"
"""The name of no format: entries stay in the model's dtype."""

NAMES = (MODEL, *FORMATS)


def format_of(name: str | EntryFormat | None) -> EntryFormat | None:
    """A format by its name, or as it is; None for the model's own dtype.

    Raises `BudgetError` for another name, and for a format that no cache has.
    """
    if isinstance(name, EntryFormat):
        if name.bits == 16 or name.key_channels < 1:
            raise BudgetError(
                f"format={name}: a cache holds entries of 8 or 4 bits with all key channels, or format=None, which "
                "leaves them in the model's dtype"
            )
        return name
    if name is None or name == MODEL:
        return None
    if not isinstance(name, str) or name not in FORMATS:
        raise BudgetError(f"format= must be one of {', '.join(NAMES)}, got {name!r}")
    return FORMATS[name]


def name_of(entry_format: EntryFormat | None) -> str:
    """The name of a format, or what it is made of where it has none."""
    if entry_format is None:
        return MODEL
    names = [name for name, known in FORMATS.items() if known == entry_format]
    return names[0] if names else str(entry_format)


def check_format(entry_format: EntryFormat | None, shape: LayerSpec) -> None:
    """Raises `BudgetError` where heads of this shape cannot be encoded."""
    if entry_format is None:
        return
    for dim in (shape.key_dim, shape.value_dim):
        try:
            check_dim(dim)
        except ValueError as error:
            raise BudgetError(f"format={name_of(entry_format)}: {error}. Leave format= out") from None


def exact_tokens(policy: EvictionPolicy, entry_format: EntryFormat | None) -> int:
    """Slots of each KV head's exact block: the policy's sink tokens and the last tokens; 0 for a format without."""
    if entry_format is None or not entry_format.exact_recent:
        return 0
    return policy.num_sink_tokens + entry_format.exact_recent


def least_entries(policy: EvictionPolicy, entry_format: EntryFormat | None) -> int:
    """The fewest entries that a KV head may be given: what the policy needs, and what stays exact."""
    return max(policy.least_capacity, exact_tokens(policy, entry_format))
