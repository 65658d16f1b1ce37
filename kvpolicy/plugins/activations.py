"""What the core hands to a plugin of one layer over one batch. Who supplies each field says `source_table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from kvpolicy.errors import PluginError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """How a layer turns its queries and keys by position (RoPE): what other positions than a forward's need.

    At position p each pair of dimensions (first[i], second[i]) is turned by the angle p * frequencies[i]. The other
    dimensions stay as they are, and in a layer without RoPE all do. Only differences of positions matter.

    first, second: int64 [P];  frequencies: float32 [P], radians per position
    """

    first: Tensor
    second: Tensor
    frequencies: Tensor

    def turned(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """A copy of states [..., D], each pair turned by the angle with this cosine and sine, both [..., P]."""
        one, two = states[..., self.first], states[..., self.second]
        out = states.clone()
        out[..., self.first] = one * cos - two * sin
        out[..., self.second] = two * cos + one * sin
        return out


ABSENT: Any = None  # so that a source has the type of its values, and not `| None`


def deferred(make: Callable[[], Tensor]) -> Any:
    """A source that is made when it is read for the first time."""
    return _Deferred(make)


class _Deferred:
    __slots__ = ("_make", "_value")

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._value = make, None

    @property
    def value(self) -> Any:
        if self._value is None:
            self._value = self._make()
        return self._value


class Sources:
    """Fields that nobody supplied cannot be read: what a policy or an estimator uses, it has to list in `requires`."""

    __slots__ = ()

    if not TYPE_CHECKING:  # a checker would take this for a leave to read any name

        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if value is None and name in type(self).__dataclass_fields__:
                raise PluginError(f"nobody supplied '{name}': list it in `requires`")
            return value.value if type(value) is _Deferred else value

        def __getattr__(self, name: str) -> Any:
            known = ", ".join(field.name for field in fields(self))
            raise AttributeError(f"{type(self).__name__} has no '{name}'; it has {known}")

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, such as for a policy inside a policy. `dataclasses.replace` reads every field."""
        return type(self)(**self.supplied() | changes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.supplied())})"

    def supplied(self) -> dict[str, Any]:
        """The fields that have a value, by name."""
        values = {field.name: object.__getattribute__(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayerActivations(Sources):
    """One budgeted layer over one batch. A field that `requires` does not list raises `PluginError`.

    layer:            index among the budgeted layers, from 0
    queries:          [B, num_q_heads, n, key_dim], after RoPE; for a later chunk of a prompt, those of the chunk
    keys, values:     [B, num_kv_heads, n, dim], keys after RoPE
    output:           [B, num_q_heads, n, value_dim], each head's attention output before the output projection
    hidden_before:    [B, n, hidden_size], residual stream before attention (before its norm)
    attention_input:  [B, n, hidden_size], what the attention module is given (after its norm)
    hidden_after:     [B, n, hidden_size], residual stream after attention was added
    output_weight:    [hidden_size, num_q_heads * value_dim], the output projection
    positions:        [B, num_kv_heads, n] int, -1 marks an absent entry, whose keys and values mean nothing
    scores:           [B, num_kv_heads, n] float32, those of the entries so far: what the policy last returned, or
                      `new_entry_score` for a decoded one since; 0 for this chunk and for absent entries
    capacity:         [B, num_kv_heads] int64, entries that each KV head may keep of these, protected spans left out; it
                      may be more than there are. Not there under an allocator that splits the budget by the scores
    query_attention:  [B, num_kv_heads, w, n], attention of each query of the observation window, summed over its
                      query group; the w queries are the last w of n, and those of padding are 0
    window_attention: [B, num_kv_heads, n], the same, summed over the queries too
    full_attention:   [B, num_kv_heads, n], attention of all queries, summed
    repeat_attention: [B, num_kv_heads, n], the largest attention that any query of the group gives the entry while the
                      model repeats its context; the context is held whole until it has
    rope:             (cos, sin) of the layer, for the tokens of this forward, as the model computed them
    rotary:           the layer's rotation by position
    scale:            what the layer multiplies products of queries and keys by
    module:           the attention module
    """

    layer: int
    queries: Tensor = ABSENT
    keys: Tensor = ABSENT
    values: Tensor = ABSENT
    output: Tensor = ABSENT
    hidden_before: Tensor = ABSENT
    attention_input: Tensor = ABSENT
    hidden_after: Tensor = ABSENT
    output_weight: Tensor = ABSENT
    positions: Tensor = ABSENT
    scores: Tensor = ABSENT
    capacity: Tensor = ABSENT
    query_attention: Tensor = ABSENT
    window_attention: Tensor = ABSENT
    full_attention: Tensor = ABSENT
    repeat_attention: Tensor = ABSENT
    rope: tuple[Tensor, Tensor] = ABSENT
    rotary: Rotary = ABSENT
    scale: float = ABSENT
    module: nn.Module = ABSENT


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayerStatistics(Sources):
    """What an allocator is told of a layer's attention. A field that `requires` does not list raises `PluginError`.

    Of the entries in front of the policy's observation window, by the queries of the window, and of each KV head by the
    mean over its query heads. Both are float32 [B, num_kv_heads], and 0 where a prompt is no longer than the window.

    attention_entropy:  how widely a query looks: the sum of -a log a over the entries, in nats, mean over the queries
    attention_variance: how much attention shifts: the variance of a over the queries, summed over the entries
    """

    attention_entropy: Tensor = ABSENT
    attention_variance: Tensor = ABSENT

    def of_rows(self, rows: Sequence[int]) -> LayerStatistics:
        """Those of some sequences."""
        return LayerStatistics(**{name: x[list(rows)] for name, x in self.supplied().items()})

    def on(self, device: torch.device) -> LayerStatistics:
        """The same on a device."""
        return LayerStatistics(**{name: x.to(device) for name, x in self.supplied().items()})


STATISTICS = frozenset(field.name for field in fields(LayerStatistics))
"""What an allocator may list in `requires`."""
