"""The format of a cache's entries by its name, and what it asks of a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvpolicy_kernels.formats import FORMATS, MAX_DIM, THINK, EntryFormat, check_dim

from kvpolicy.errors import BudgetError
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.roles import EvictionPolicy

MODEL = "model"
"""The name of no format: entries stay in the model's dtype."""

_NAMED = FORMATS | {"think": THINK}
NAMES = (MODEL, *_NAMED)
OF_A_TOKEN = (MODEL, *FORMATS)
"""Those under which what becomes of a token is up to that token alone."""


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
    return _NAMED.get(name)


def _checked(entry_format: EntryFormat | None) -> EntryFormat | None:
    if entry_format is not None and not (_is_coded(entry_format) or _is_thin(entry_format)):
        raise BudgetError(
            f"format={entry_format}: a cache holds entries of 8 or 4 bits with all key channels, or of 16 bits with a "
            "part of them and the last tokens exact, or format=None, which leaves them in the model's dtype"
        )
    return entry_format


def _is_coded(own: EntryFormat) -> bool:
    return own.bits < 16 and own.key_channels == 1


def _is_thin(own: EntryFormat) -> bool:
    return own.bits == 16 and own.key_channels < 1 and bool(own.exact_recent)


def kinds(entry_format: Format) -> set[EntryFormat]:
    """The formats of its layers, those without one left out."""
    layers = entry_format.layers if isinstance(entry_format, LayerFormats) else (entry_format,)
    return {own for own in layers if own is not None}


def is_thin(entry_format: Format) -> bool:
    """Whether keys keep a part of their channels, which the queries of a prompt choose."""
    return any(map(_is_thin, kinds(entry_format)))


def is_centred(entry_format: Format) -> bool:
    """Whether keys of any layer are encoded less a centre."""
    return any(own.centred for own in kinds(entry_format))


def name_of(entry_format: Format) -> str:
    """The name of a format, or what it is made of where it has none; of several, how many layers have each."""
    if isinstance(entry_format, LayerFormats):
        return ", ".join(f"{name} in {n}" for name, n in Counter(map(name_of, entry_format.layers)).most_common())
    if entry_format is None:
        return MODEL
    names = [name for name, known in _NAMED.items() if known == entry_format]
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
    shape = spec.attention
    if is_thin(entry_format) and shape.key_dim > MAX_DIM:
        raise BudgetError(
            f"format={name_of(entry_format)}: keys have {shape.key_dim} channels, {MAX_DIM} are the most. Leave "
            "format= out"
        )
    for dim in (shape.key_dim, shape.value_dim) if any(own.bits < 16 for own in kinds(entry_format)) else ():
        try:
            check_dim(dim)
        except ValueError as error:
            raise BudgetError(f"format={name_of(entry_format)}: {error}. Leave format= out") from None


def check_queries(policy: EvictionPolicy, entry_format: Format) -> None:
    """Raises `BudgetError` where a prompt's queries are to choose key channels and are gone before they can."""
    if is_thin(entry_format) and "repeat_attention" in policy.requires:
        raise BudgetError(
            f"format={name_of(entry_format)}: a prompt's queries choose which key channels are kept, and behind the "
            f"repeated context of {type(policy).__name__} they are gone: take another format or another policy"
        )


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
