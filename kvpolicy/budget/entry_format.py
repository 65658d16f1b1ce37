"""The format of a cache's entries by its name, and what it asks of a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvpolicy_kernels.formats import FORMATS, EntryFormat, check_dim

from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy

MODEL = "model"
"""The name of no format: entries stay in the model's dtype."""

NAMES = (MODEL, *FORMATS)


@dataclass(frozen=True, slots=True)
class LayerFormats:
    """Formats that differ from one budgeted layer to another; None where entries stay in the model's dtype."""

    layers: tuple[EntryFormat | None, ...]


Format = EntryFormat | LayerFormats | None
"""Of the entries of a cache: one for all layers, or one for each; None for the model's dtype."""


def of_layers(layers: Sequence[EntryFormat | None]) -> Format:
    """The format of a cache whose budgeted layers have these."""
    return LayerFormats(tuple(layers)) if len(set(layers)) > 1 else layers[0]


def of_layer(entry_format: Format, layer: int) -> EntryFormat | None:
    """That of one budgeted layer, counted from 0."""
    return entry_format.layers[layer] if isinstance(entry_format, LayerFormats) else entry_format


def format_of(name: str | Format) -> Format:
    """A format by its name, or as it is; None for the model's own dtype.

    Raises `BudgetError` for another name, and for a format that no cache has.
    """
    if isinstance(name, LayerFormats):
        return of_layers([_checked(entry_format) for entry_format in name.layers])
    if name is None or isinstance(name, EntryFormat):
        return _checked(name)
    return named(name)


def named(name: str) -> EntryFormat | None:
    """A format by its name. Raises `BudgetError` for another name."""
    if not isinstance(name, str) or name not in NAMES:
        raise BudgetError(f"format= must be one of {', '.join(NAMES)}, got {name!r}")
    return FORMATS.get(name)


def _checked(entry_format: EntryFormat | None) -> EntryFormat | None:
    if entry_format is not None and (entry_format.bits == 16 or entry_format.key_channels < 1):
        raise BudgetError(
            f"format={entry_format}: a cache holds entries of 8 or 4 bits with all key channels, or format=None, which "
            "leaves them in the model's dtype"
        )
    return entry_format


def name_of(entry_format: Format) -> str:
    """The name of a format, or what it is made of where it has none; of several, how many layers have each."""
    if isinstance(entry_format, LayerFormats):
        return ", ".join(f"{name} in {n}" for name, n in Counter(map(name_of, entry_format.layers)).most_common())
    if entry_format is None:
        return MODEL
    names = [name for name, known in FORMATS.items() if known == entry_format]
    return names[0] if names else str(entry_format)


def check_format(entry_format: Format, spec: ModelSpec) -> None:
    """Raises `BudgetError` where the model's heads cannot be encoded, or its layers are not those of the formats."""
    if entry_format is None:
        return
    if isinstance(entry_format, LayerFormats) and len(entry_format.layers) != spec.num_budgeted_layers:
        raise BudgetError(
            f"there are formats for {len(entry_format.layers)} layers, the model has {spec.num_budgeted_layers} with a "
            "budget"
        )
    for dim in (spec.attention.key_dim, spec.attention.value_dim):
        try:
            check_dim(dim)
        except ValueError as error:
            raise BudgetError(f"format={name_of(entry_format)}: {error}. Leave format= out") from None


def exact_recent(entry_format: Format) -> int:
    """The last tokens that stay exact; of several formats, in the layers that keep the most of them."""
    if isinstance(entry_format, LayerFormats):
        return max(map(exact_recent, entry_format.layers))
    return 0 if entry_format is None else entry_format.exact_recent


def exact_tokens(policy: EvictionPolicy, entry_format: Format) -> int:
    """Slots of each KV head's exact block: the policy's sink tokens and the last tokens; 0 for a format without."""
    recent = exact_recent(entry_format)
    return policy.num_sink_tokens + recent if recent else 0


def least_entries(policy: EvictionPolicy, entry_format: Format) -> int:
    """The fewest entries that a KV head may be given, in every layer: what the policy needs, and what stays exact."""
    return max(policy.least_capacity, exact_tokens(policy, entry_format))
