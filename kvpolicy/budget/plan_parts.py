"""The pieces of a plan, with what each must hold and how it is read from and written to JSON."""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from kvpolicy_kernels.formats import check_dim
from torch import Tensor

from kvpolicy.budget.entry_format import MODEL, NAMES, Format, named, of_layers
from kvpolicy.errors import BudgetError, PlanError
from kvpolicy.files.fields import Fields, check_json, describe, number, sequence, table, text, vector, whole
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.model.spec import Importance, ModelSpec
from kvpolicy.plugins.registry import registry

_MAX_LAYERS = 10_000  # a file may say any number, and a specification has an object for each
_MEAN_TOLERANCE = 1e-6  # shares written with six decimals still pass


@dataclass(frozen=True, slots=True)
class PlanModel:
    """The model a plan was made for.

    budgeted_layers: model layer indices, ascending
    shared_layers:   pairs of layers, one that keeps no entries and the earlier one whose entries it attends over,
        beside what the model shares by itself

    Raises `PlanError`, naming the field, for other layers.
    """

    id: str
    revision: str | None
    config_sha256: str
    num_layers: int
    budgeted_layers: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    shared_layers: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.budgeted_layers:
            raise PlanError("model.budgeted_layers is empty, expected at least one layer")
        previous = -1
        for index, layer in enumerate(self.budgeted_layers):
            if not previous < layer < self.num_layers:
                raise PlanError(
                    f"model.budgeted_layers[{index}] is {layer}, expected ascending indices below "
                    f"model.num_layers = {self.num_layers}"
                )
            previous = layer
        for index, (layer, owner) in enumerate(self.shared_layers):
            if layer in self.budgeted_layers or not 0 <= owner < layer < self.num_layers:
                raise PlanError(
                    f"model.shared_layers[{index}] is {[layer, owner]}, expected a layer without a budget and an "
                    "earlier one"
                )

    def to_spec(self) -> ModelSpec:
        """A model of this shape with plain attention; layers without a budget stand as linear ones."""
        budgeted = set(self.budgeted_layers)
        full = LayerSpec("full", self.num_q_heads, self.num_kv_heads, self.head_dim, self.head_dim)
        layers = tuple(full if index in budgeted else replace(full, kind="linear") for index in range(self.num_layers))
        return ModelSpec(self.id or "unknown", self.num_q_heads * self.head_dim, 0, 0, "", layers)

    @classmethod
    def from_spec(cls, spec: ModelSpec, model_id: str = "", revision: str | None = None) -> PlanModel:
        return cls(
            model_id,
            revision,
            spec.config_sha256,
            len(spec.layers),
            spec.budgeted_layers,
            spec.num_q_heads,
            spec.num_kv_heads,
            spec.head_dim,
        )

    @property
    def table_shape(self) -> tuple[int, int]:
        """`(L, H)`."""
        return len(self.budgeted_layers), self.num_kv_heads


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """One plugin by name, with its hyper-parameters (JSON values)."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanMethod:
    """Who measured, who split, who evicts; None where nobody did (a user's own table)."""

    estimator: PlanChoice | None
    allocator: PlanChoice | None
    policy: PlanChoice


@dataclass(frozen=True, slots=True, eq=False)
class PlanLevel:
    """What was found for one retention.

    shares:     float64 `[L, H]`, the kept fraction of the context, 0 to 1; their mean is `retention`
    formats:    names of the formats of the budgeted layers' entries, "model" for the model's dtype; None where that is
        the one of all of them
    perplexity: of search, heldout, heldout_full, heldout_uniform (those that were measured)
    comparison: free-form facts about plan against uniform, such as `interval` (95 % paired bootstrap of the
        held-out loss difference, nats per token, [low, high]) and `verdict` in words
    retrieval:  `answer_loss` of needle prompts (search, heldout, heldout_full, heldout_uniform; nats per token) and
        `passkey` (score and full, the parts of n held-out prompts of `length` tokens whose number is found under the
        plan and with the full cache), those that were measured
    """

    retention: float
    shares: Tensor
    allocator_params: dict[str, Any] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    retrieval: dict[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", self.shares.detach().to("cpu", torch.float64))
        if self.formats is not None:
            own = tuple(self.formats)
            object.__setattr__(self, "formats", None if set(own) == {MODEL} else own)

    @property
    def entry_format(self) -> Format:
        """Of the entries of a cache under this level."""
        return None if self.formats is None else of_layers([named(name) for name in self.formats])

    def of_rows(self, rows: list[int]) -> PlanLevel:
        """The level of these layers alone, in their proportions, at the same retention, without what was measured."""
        shares = kept_fractions(self.shares[rows], self.retention)
        formats = None if self.formats is None else tuple(self.formats[row] for row in rows)
        return PlanLevel(self.retention, shares, self.allocator_params, formats=formats)


def check_sharing(own: PlanModel, theirs: PlanModel) -> None:
    """Raises `PlanError` for a model whose layers keep entries of their own where a plan has them share."""
    layers = sorted(layer for layer, _ in own.shared_layers)
    if layers and theirs.budgeted_layers == tuple(sorted((*own.budgeted_layers, *layers))):
        raise PlanError(
            f"the plan has layers {layers} keep no entries (shared_layers), which is not done here: new_cache, and "
            "'kvpolicy generate', 'bench', 'eval' and 'compare' do it"
        )


def check_method(method: PlanMethod) -> None:
    for name in PlanMethod.__slots__:
        choice = getattr(method, name)
        if choice is not None:
            check_json(choice.params, f"method.{name}.params")
    if "num_sink_tokens" in method.policy.params:
        whole(method.policy.params["num_sink_tokens"], "method.policy.params.num_sink_tokens", 0)


def check_level(level: PlanLevel, path: str, model: PlanModel) -> None:
    shape = model.table_shape
    if not 0 < level.retention <= 1:
        raise PlanError(f"{path}.retention is {level.retention}, expected above 0 and at most 1")
    if tuple(level.shares.shape) != shape:
        raise PlanError(
            f"{path}.shares has shape {tuple(level.shares.shape)}, expected (budgeted layers, KV heads) = {shape}"
        )
    bad = ~((level.shares >= 0) & (level.shares <= 1))  # NaN too
    if bool(bad.any()):
        layer, head = bad.nonzero()[0].tolist()
        raise PlanError(
            f"{path}.shares[{layer}][{head}] is {float(level.shares[layer, head])}, expected a fraction from 0 to 1"
        )
    mean = float(level.shares.mean())
    if abs(mean - level.retention) > _MEAN_TOLERANCE:
        raise PlanError(f"{path}.shares have the mean {mean:.9g}, expected the level's retention {level.retention:.9g}")
    if level.formats is not None:
        _check_formats(level.formats, f"{path}.formats", model)
    for name in ("allocator_params", "perplexity", "comparison", "retrieval"):
        check_json(getattr(level, name), f"{path}.{name}")
    for key, value in level.perplexity.items():
        if number(value, f"{path}.perplexity.{key}") < 0:
            raise PlanError(f"{path}.perplexity.{key} is {value}, expected at least 0")
    _check_retrieval(level.retrieval, f"{path}.retrieval")


def _check_formats(formats: tuple[str, ...], path: str, model: PlanModel) -> None:
    layers = len(model.budgeted_layers)
    if len(formats) != layers:
        raise PlanError(f"{path} has {len(formats)} items, expected one for each of {layers} budgeted layers")
    for index, name in enumerate(formats):
        if name not in NAMES:
            raise PlanError(f"{path}[{index}] is {describe(name)}, expected one of {', '.join(NAMES)}")
    try:
        check_dim(model.head_dim)
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from None


def _check_retrieval(retrieval: dict[str, Any], path: str) -> None:
    """What reports read must be numbers."""
    answers, passkey = (Fields(retrieval.get(name) or {}, f"{path}.{name}") for name in ("answer_loss", "passkey"))
    for name in ("search", "heldout", "heldout_full", "heldout_uniform"):
        if answers.has(name):
            answers.read(name, number)
    for name in ("score", "full"):
        if passkey.has(name) and not 0 <= passkey.read(name, number) <= 1:
            raise PlanError(f"{passkey.path(name)} is {passkey.raw(name)}, expected a part from 0 to 1")


def read_model(fields: Fields) -> PlanModel:
    layers = fields.read("budgeted_layers", sequence)
    return PlanModel(
        id=fields.read("id", text),
        revision=fields.read("revision", text) if fields.has("revision") else None,
        config_sha256=fields.read("config_sha256", text),
        num_layers=fields.read("num_layers", whole, 1, _MAX_LAYERS),
        budgeted_layers=tuple(whole(x, f"model.budgeted_layers[{i}]", 0) for i, x in enumerate(layers)),
        num_q_heads=fields.read("num_q_heads", whole, 1),
        num_kv_heads=fields.read("num_kv_heads", whole, 1),
        head_dim=fields.read("head_dim", whole, 1),
        shared_layers=read_shared_layers(fields),
    )


def read_shared_layers(fields: Fields) -> tuple[tuple[int, int], ...]:
    """Pairs of layers. Raises `PlanError` naming the field."""
    if not fields.has("shared_layers"):
        return ()
    pairs = enumerate(fields.read("shared_layers", sequence))
    return tuple(_read_pair(pair, fields.path(f"shared_layers[{i}]")) for i, pair in pairs)


def _read_pair(value: object, path: str) -> tuple[int, int]:
    first, second = (whole(x, f"{path}[{i}]", 0, _MAX_LAYERS) for i, x in enumerate(sequence(value, path, 2)))
    return first, second


def _read_choice(fields: Fields) -> PlanChoice:
    return PlanChoice(fields.read("name", text), fields.mapping("params"))


def read_method(fields: Fields) -> PlanMethod:
    return PlanMethod(
        estimator=_read_choice(fields.fields("estimator")) if fields.has("estimator") else None,
        allocator=_read_choice(fields.fields("allocator")) if fields.has("allocator") else None,
        policy=_read_choice(fields.fields("policy")),
    )


def read_importance(fields: Fields, shape: tuple[int, int]) -> Importance:
    per_head = fields.read("per_head", table, shape).to(torch.float32)
    per_layer = fields.read("per_layer", vector, shape[0]).to(torch.float32) if fields.has("per_layer") else None
    try:
        return Importance(per_head, per_layer)
    except BudgetError as error:
        raise PlanError(str(error)) from None


def read_level(fields: Fields, shape: tuple[int, int]) -> PlanLevel:
    formats = fields.read("formats", sequence, shape[0]) if fields.has("formats") else None
    return PlanLevel(
        retention=fields.read("retention", number),
        shares=fields.read("shares", table, shape),
        allocator_params=fields.mapping("allocator_params"),
        perplexity=fields.mapping("perplexity"),
        comparison=fields.mapping("comparison"),
        retrieval=fields.mapping("retrieval"),
        formats=None
        if formats is None
        else tuple(text(x, fields.path(f"formats[{i}]")) for i, x in enumerate(formats)),
    )


def model_json(model: PlanModel) -> dict[str, Any]:
    document = {name: getattr(model, name) for name in PlanModel.__slots__}
    document["budgeted_layers"] = list(model.budgeted_layers)
    if not document.pop("shared_layers"):
        return document
    return document | {"shared_layers": [list(pair) for pair in model.shared_layers]}


def choice_json(choice: PlanChoice | None) -> dict[str, Any] | None:
    return None if choice is None else {"name": choice.name, "params": choice.params}


def importance_json(importance: Importance | None) -> dict[str, Any] | None:
    if importance is None:
        return None
    per_layer = importance.per_layer
    return {
        "per_head": importance.per_head.tolist(),
        "per_layer": None if per_layer is None else per_layer.tolist(),
    }


def level_json(level: PlanLevel) -> dict[str, Any]:
    return {
        "retention": level.retention,
        "shares": level.shares.tolist(),
        "allocator_params": level.allocator_params,
        "perplexity": level.perplexity,
        "comparison": level.comparison,
        "retrieval": level.retrieval,
    } | ({} if level.formats is None else {"formats": list(level.formats)})


def kept_fractions(proportions: Tensor, retention: float) -> Tensor:
    """Shares as a level stores them: float64 of the same shape, in proportion, at most 1, with mean `retention`.

    proportions: `[L, H]`, finite, >= 0, as an allocator returns them. Where they would exceed 1 the excess goes
        to the others in proportion, and to those of zero share, evenly, when no others are left.
    """
    weights = proportions.detach().to("cpu", torch.float64)
    weights = weights / weights.max().clamp(min=1e-300)
    weights = weights.where(weights > 1e-100, torch.zeros_like(weights))  # the ratios below stay in range
    shares = torch.zeros_like(weights)
    left = retention * weights.numel()
    for members in (weights > 0, weights == 0):
        open_ = members.clone()
        while bool(open_.any()) and left > 0:
            part = torch.where(open_, weights.where(weights > 0, torch.ones_like(weights)), 0.0)
            filled = part * (left / float(part.sum()))
            full = filled >= 1
            if not bool(full.any()):
                shares += filled
                left = 0.0
            else:
                shares[full] = 1.0
                left -= int(full.sum())
                open_ &= ~full
    return shares


def positive(name: str, value: object) -> int:
    """`value` as an int of at least 1; numpy's and torch's integers pass."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            result = operator.index(value)  # type: ignore[arg-type]
            if result >= 1:
                return result
    raise BudgetError(f"{name} is {describe(value)}, expected a whole number of at least 1")


def read_capacities(value: object, shape: tuple[int, int], floor: int, ceiling: int) -> Tensor:
    try:
        table = torch.as_tensor(value).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise BudgetError(f"the capacity table is no table of numbers: {error}") from None
    if tuple(table.shape) != shape:
        raise BudgetError(f"the capacity table has shape {tuple(table.shape)}, expected (layers, KV heads) = {shape}")
    if table.dtype == torch.bool or table.is_complex():
        raise BudgetError(f"the capacity table holds {table.dtype}, expected whole numbers")
    numbers = table.to(torch.float64)
    bad = ~((numbers >= floor) & (numbers <= ceiling) & (numbers == numbers.floor()))
    if bool(bad.any()):
        layer, head = bad.nonzero()[0].tolist()
        raise BudgetError(
            f"the capacity table's layer {layer}, KV head {head} is {float(numbers[layer, head]):g}, expected a whole "
            f"number from {floor} (sink tokens + 1) to {ceiling} (context_length)"
        )
    return numbers.to(torch.int64)


def least_capacity_of(choice: PlanChoice) -> int:
    """The fewest entries of a KV head under a policy. Asks it: what its parameters leave out is its default.

    Raises `PluginError` for a policy that is not installed here, or does not take these parameters.
    """
    return registry.create("policy", choice.name, choice.params).least_capacity
