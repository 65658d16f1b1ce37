"""The one table of sources: what a plugin may list in `requires`, who can supply it, and what it costs.

Every set of sources elsewhere is made from this table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Supplier = Literal["probe", "store", "model", "step"]
"""Who hands a source over.

probe: a model and its text, to an estimator;  store: a cache's own store, to a policy, with a prompt or a chunk of one
model: the model around a store, which sees more than queries, keys and values;  step: a store, with a decoded token
"""


@dataclass(frozen=True, slots=True)
class Source:
    """One row.

    suppliers:       whom it can come from
    cost:            what supplying it takes, besides a copy where it is a tensor
    needs_cache:     whether it is of what a cache has done, so that no forward of a model alone has it
    outlives_prompt: whether it is there yet when a context has been repeated, behind its own forward
    """

    suppliers: frozenset[Supplier]
    cost: str = "nothing"
    needs_cache: bool = False
    outlives_prompt: bool = False


def _by(*suppliers: Supplier) -> frozenset[Supplier]:
    return frozenset(suppliers)


_KEY_PASS, _HOOKS = "a pass over the keys", "hooks on the layers"
TABLE = {
    "positions": Source(_by("store", "step"), outlives_prompt=True),
    "scores": Source(_by("store", "step"), needs_cache=True),
    "keys": Source(_by("probe", "store", "step"), outlives_prompt=True),
    "values": Source(_by("probe", "store", "step"), outlives_prompt=True),
    "queries": Source(_by("probe", "store")),
    "scale": Source(_by("probe", "store")),
    "capacity": Source(_by("store"), "prompts are scored for each budget", needs_cache=True, outlives_prompt=True),
    "query_attention": Source(_by("store"), "a pass over the keys for each query of the window"),
    "window_attention": Source(_by("probe", "store"), _KEY_PASS),
    "full_attention": Source(_by("probe", "store"), "all queries with all keys, as attention itself"),
    "decode_attention": Source(_by("step"), _KEY_PASS, needs_cache=True, outlives_prompt=True),
    "repeat_attention": Source(_by("model"), "the context is run again, over the full cache", needs_cache=True),
    "hidden_before": Source(_by("probe", "model"), _HOOKS),
    "attention_input": Source(_by("probe", "model"), _HOOKS),
    "rope": Source(_by("probe", "model"), _HOOKS),
    "hidden_after": Source(_by("probe"), _HOOKS),
    "output": Source(_by("probe")),
    "output_weight": Source(_by("probe", "model"), outlives_prompt=True),
    "rotary": Source(_by("probe", "model"), outlives_prompt=True),
    "module": Source(_by("probe", "model"), outlives_prompt=True),
}
"""Every source, by name. All but `decode_attention` are fields of `LayerActivations`."""

SOURCES = frozenset(TABLE)
"""What a plugin may list in `requires`."""

OUTLIVE_PROMPT = frozenset(name for name, source in TABLE.items() if source.outlives_prompt)
"""What a policy that requires `repeat_attention` may require besides."""

NEED_CACHE = frozenset(name for name, source in TABLE.items() if source.needs_cache)
"""What no probe has."""


def supplied_by(*suppliers: Supplier) -> frozenset[str]:
    """The names of the sources that one of these suppliers has."""
    return frozenset(name for name, source in TABLE.items() if source.suppliers.intersection(suppliers))


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(sorted(names))
