"""What the core knows of a model and of a budget: frozen values, checked when they are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import BudgetError, ModelError
from kvpolicy.model.config import spec_fields
from kvpolicy.model.layer_spec import LayerSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as the core sees it. `L` and `H` below are `num_budgeted_layers` and `num_kv_heads`.

    Raises `ModelError` when no layer can be budgeted or the budgeted layers differ in their heads.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    max_context: int
    rope: str
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        budgeted = [self.layers[index] for index in self.budgeted_layers]
        if not budgeted:
            kinds = sorted({layer.kind for layer in self.layers})
            raise ModelError(
                f"model type '{self.model_type}' has no full-attention layer to budget (layers: "
                f"{', '.join(kinds) or 'none'}); sliding, chunked and linear layers keep stock caches"
            )
        shapes = {(x.num_q_heads, x.num_kv_heads, x.key_dim, x.value_dim) for x in budgeted}
        if len(shapes) > 1:
            raise ModelError(
                f"the full-attention layers of model type '{self.model_type}' differ in (query heads, KV "
                f"heads, key dim, value dim): {sorted(shapes)}; kvpolicy needs them equal"
            )

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """The spec of a transformers configuration (any object with its attribute names).

        Raises `ModelError` for a configuration whose attention cannot be budgeted (MLA, encoder-decoder).
        """
        return cls(**spec_fields(config))

    def sharing(self, shared_layers: Mapping[int, int]) -> ModelSpec:
        """The same model with layers that keep no entries and attend over those of an earlier layer instead (KVSharer).

        shared_layers: which layer takes whose entries. A taker's taker takes those of the layer that keeps some

        Raises `ModelError` for layers that are not full-attention layers with entries of their own, for a layer that
        takes those of itself or of a later one, and for one whose own entries other layers of the model reuse.
        """
        layers = list(self.layers)
        for index, owner in sorted(shared_layers.items()):
            for layer in (index, owner):
                if not 0 <= layer < len(layers) or not self.layers[layer].is_budgeted:
                    raise ModelError(
                        f"shared_layers: layer {layer} of model type '{self.model_type}' is no full-attention layer "
                        f"with entries of its own; those are {list(self.budgeted_layers)}"
                    )
            if owner >= index:
                raise ModelError(f"shared_layers: layer {index} cannot take layer {owner}'s entries: that comes later")
            if index in self.reused_layers:
                raise ModelError(
                    f"shared_layers: layer {index} keeps its entries, which other layers of the model reuse"
                )
            keeper = layers[owner].shared_with
            layers[index] = replace(layers[index], shared_with=owner if keeper is None else keeper)
        return replace(self, layers=tuple(layers))

    @property
    def budgeted_layers(self) -> tuple[int, ...]:
        """Model layer indices that get a budget, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_budgeted)

    @property
    def reused_layers(self) -> frozenset[int]:
        """Layers whose entries others reuse."""
        return frozenset(layer.shared_with for layer in self.layers if layer.shared_with is not None)

    @property
    def attention(self) -> LayerSpec:
        """The shape that all budgeted layers share."""
        return next(layer for layer in self.layers if layer.is_budgeted)

    @property
    def num_budgeted_layers(self) -> int:
        return len(self.budgeted_layers)

    @property
    def num_q_heads(self) -> int:
        return self.attention.num_q_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.key_dim

    @property
    def table_shape(self) -> tuple[int, int]:
        """`(L, H)`, the shape of every table of shares, capacities and importance."""
        return self.num_budgeted_layers, self.num_kv_heads

    def entry_bytes(self, itemsize: int) -> int:
        """Bytes of one entry (key and value) in one KV head of a budgeted layer."""
        return (self.attention.key_dim + self.attention.value_dim) * itemsize

    def total_entries(self, retention: float, context_length: int) -> int:
        """`round(retention * context_length * L * H)`: the budget of one sequence, in entries."""
        return total_entries(retention, context_length, self.table_shape)

    @property
    def config_sha256(self) -> str:
        """Identity of the configuration: model type, sizes, layer specs, rope, vocabulary."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def total_entries(retention: float, context_length: int, shape: tuple[int, int]) -> int:
    """`round(retention * context_length * L * H)`, for KV heads `(L, H)`."""
    return round(retention * context_length * shape[0] * shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """Entries that one sequence may keep, over all budgeted layers and KV heads.

    total:   entries in all; with `cost`, units of cost in all
    shape:   `(L, H)`
    floor, ceiling: least and most entries of a KV head; an int, or an int tensor `[L, H]`
    cost:    units one entry costs, int tensor `[L, H]`; None means 1 each
    groups:  int tensor `[L, H]` that assigns each KV head to a group with an exact total of its own
             (tensor-parallel ranks); None means one group
    """

    total: int
    shape: tuple[int, int]
    floor: int | Tensor
    ceiling: int | Tensor
    cost: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("floor", "ceiling", "cost", "groups"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and tuple(value.shape) != self.shape:
                raise BudgetError(
                    f"budget {name} has shape {tuple(value.shape)}, expected (layers, KV heads) = {self.shape}"
                )
        floor, ceiling = self.floors(), self.ceilings()
        if self.total < 0 or int(floor.min()) < 0 or bool((floor > ceiling).any()):
            raise BudgetError(
                f"a budget needs total >= 0 and 0 <= floor <= ceiling for each KV head, got total {self.total}, "
                f"floors from {int(floor.min())}, ceilings from {int(ceiling.min())}"
            )

    def floors(self) -> Tensor:
        """int64 `[L, H]`."""
        return torch.as_tensor(self.floor, dtype=torch.int64).expand(self.shape)

    def ceilings(self) -> Tensor:
        """int64 `[L, H]`."""
        return torch.as_tensor(self.ceiling, dtype=torch.int64).expand(self.shape)

    @property
    def uniform_capacity(self) -> float:
        """Entries per KV head where all have as many."""
        return self.total / (self.shape[0] * self.shape[1] if self.cost is None else int(self.cost.sum()))


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """How much each KV head matters. Larger means: keep more entries. Only ratios count.

    per_head:  float32 `[L, H]`, finite, >= 0
    per_layer: float32 `[L]` or None
    curves:    float32 `[L, H, K]`, finite, >= 0, loss at K capacities of a KV head, or None; only differences count
    curve_capacities: int `[K]`, these capacities, ascending, or None
    format_curves: such curves of one KV head alone with the entries in each of the formats that the probe named, by
        their names, or None
    together:  float32 `[L, H, K, L, H, K]`, finite, 0 for a head with itself, or None: what two KV heads lose, each at
        one of its capacities, beyond what each loses alone, half of it; below 0 where they take back from each other
    """

    per_head: Tensor
    per_layer: Tensor | None = None
    curves: Tensor | None = None
    curve_capacities: Tensor | None = None
    format_curves: Mapping[str, Tensor] | None = None
    together: Tensor | None = None

    def __post_init__(self) -> None:
        if self.per_head.dim() != 2:
            raise BudgetError(f"importance per head must be [layers, KV heads], got {list(self.per_head.shape)}")
        if self.per_layer is not None and self.per_layer.shape != self.per_head.shape[:1]:
            raise BudgetError(
                f"importance per layer must be [{self.per_head.shape[0]}], got {list(self.per_layer.shape)}"
            )
        points = None if self.curve_capacities is None else (*self.per_head.shape, len(self.curve_capacities))
        if (None if self.curves is None else tuple(self.curves.shape)) != points:
            raise BudgetError("importance curves [layers, KV heads, K] and curve_capacities [K] go together")
        if self.curve_capacities is not None and not bool((self.curve_capacities.diff() > 0).all()):
            raise BudgetError(f"importance curve_capacities must ascend, got {self.curve_capacities.tolist()}")
        values = {f"format_curves['{name}']": curves for name, curves in (self.format_curves or {}).items()}
        if any(tuple(curves.shape) != points for curves in values.values()):
            raise BudgetError("importance format_curves [layers, KV heads, K] have the points of curve_capacities")
        if self.together is not None:
            self._check_together(self.together, points)
        values |= {name: getattr(self, name) for name in ("per_head", "per_layer", "curves")}
        for name, value in values.items():
            if value is not None and not bool((torch.isfinite(value) & (value >= 0)).all()):
                bad = (~(torch.isfinite(value) & (value >= 0))).nonzero()[0].tolist()
                raise BudgetError(f"importance {name} must be finite and >= 0; index {bad} is {value[tuple(bad)]}")

    def _check_together(self, together: Tensor, points: tuple[int, ...] | None) -> None:
        if points is None:
            raise BudgetError("importance together was given without curves: they go together")
        if tuple(together.shape) != (*points, *points):
            raise BudgetError(f"importance together is {list(together.shape)}, expected {[*points, *points]}")
        if not bool(together.isfinite().all()):
            raise BudgetError("importance together must be finite: the estimator gave a number that is not")
