"""The three roles a plugin can fill, and the values they are given.

A plugin object is a frozen dataclass whose fields are JSON-able hyper-parameters with defaults. It keeps no
state between calls. Selection, movement, rounding, sink protection are the core's.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from kvpolicy.errors import PluginError
from kvpolicy.model.spec import Budget, Importance, ModelSpec
from kvpolicy.progress import Progress

SplitScope = Literal["none", "layer", "model"]
SoftTarget = Literal["full", "text"]
ScoreBias = Callable[[int, Tensor], Tensor]
"""`bias(layer, rank)`: budgeted layer, int64 `[H or 1, q, k]` -> float32 `[H, q, k]`.

The rank of an entry is how many others that may be evicted outlive it, and -1 where it is never evicted: a KV head of
capacity c keeps what ranks below c less the sink tokens. Under the window rule the rank is the distance from the query.
"""

SOURCES = frozenset(
    {
        "positions",
        "scores",
        "keys",
        "values",
        "queries",
        "query_attention",
        "window_attention",
        "full_attention",
        "repeat_attention",
        "decode_attention",
        "hidden_before",
        "hidden_after",
        "attention_input",
        "output",
        "rope",
        "rotary",
        "scale",
        "output_weight",
        "module",
    }
)
"""What a plugin may list in `requires`; each but `decode_attention` is a field of `LayerActivations`.

Only a cache has `scores`, `repeat_attention` and `decode_attention`: a probe refuses them.
"""


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


_ABSENT: Any = None  # so that a source has the type of its values, and not `| None`


class _Sources:
    """Fields that nobody supplied cannot be read: what a policy or an estimator uses, it has to list in `requires`."""

    __slots__ = ()

    if not TYPE_CHECKING:  # a checker would take this for a leave to read any name

        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if value is None and name in type(self).__dataclass_fields__:
                raise PluginError(f"nobody supplied '{name}': list it in `requires`")
            return value

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
class LayerActivations(_Sources):
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
    queries: Tensor = _ABSENT
    keys: Tensor = _ABSENT
    values: Tensor = _ABSENT
    output: Tensor = _ABSENT
    hidden_before: Tensor = _ABSENT
    attention_input: Tensor = _ABSENT
    hidden_after: Tensor = _ABSENT
    output_weight: Tensor = _ABSENT
    positions: Tensor = _ABSENT
    scores: Tensor = _ABSENT
    query_attention: Tensor = _ABSENT
    window_attention: Tensor = _ABSENT
    full_attention: Tensor = _ABSENT
    repeat_attention: Tensor = _ABSENT
    rope: tuple[Tensor, Tensor] = _ABSENT
    rotary: Rotary = _ABSENT
    scale: float = _ABSENT
    module: nn.Module = _ABSENT


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DecodeStep(_Sources):
    """The entries of one layer after one decoding step.

    Segment i belongs to sequence `i // num_kv_heads` and KV head `i % num_kv_heads` and spans
    `indptr[i]` to `indptr[i + 1]`.

    num_kv_heads: KV heads of the layer; under tensor parallelism those of this rank
    scores, positions: [num_entries];  indptr: [B * num_kv_heads + 1] int32
    keys:      [num_entries, key_dim]; raises `PluginError` unless "keys" is required
    attention: [num_entries] mass of this step summed over the query group; as keys, for "decode_attention"
    """

    layer: int
    num_kv_heads: int
    scores: Tensor
    positions: Tensor
    indptr: Tensor
    keys: Tensor = _ABSENT
    attention: Tensor = _ABSENT

    @property
    def segment(self) -> Tensor:
        """int64 [num_entries], the segment of each entry."""
        lengths = self.indptr.diff()
        segments = torch.arange(len(lengths), device=lengths.device)
        return segments.repeat_interleave(lengths, output_size=len(self.scores))


class Trial(Protocol):
    """The part of an Optuna trial that `suggest` uses; the core needs no optuna for it."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class ModelProbe(abc.ABC):
    """A model and its calibration text, as an estimator or a learning allocator sees them."""

    @property
    @abc.abstractmethod
    def spec(self) -> ModelSpec:
        """The model's layers and heads."""

    @property
    @abc.abstractmethod
    def context_length(self) -> int:
        """Tokens that a table of capacities is for: as many for each KV head keep everything.

        A whole sequence under a window rule; the prompt where a prompt is compressed.
        """

    @property
    def least_capacity(self) -> int:
        """The fewest entries a KV head may have in `loss`: one more than the sink tokens. The default is 1."""
        return 1

    @property
    def prompts(self) -> Sequence[Tensor]:
        """The calibration prompts, int64 `[n]` token ids each, of different lengths.

        They begin as the model expects a text to begin, for example with a beginning-of-sequence token.
        Raises `PluginError` where the probe does not show them.
        """
        raise PluginError(f"{type(self).__name__} does not show its calibration prompts")

    def tokenize(self, text: str) -> Tensor:
        """The token ids of a text, int64 `[n]`, without special tokens: parts can be put together to a prompt.

        Raises `PluginError` where the probe has no tokenizer.
        """
        raise PluginError(f"{type(self).__name__} has no tokenizer, and was asked for the tokens of {text[:40]!r}")

    @abc.abstractmethod
    def observe(
        self,
        visit: Callable[[LayerActivations], None],
        requires: frozenset[str],
        *,
        prompts: Sequence[Tensor] | None = None,
        observation_window: int = 32,
    ) -> None:
        """Runs prompts one after another and calls `visit` once for each budgeted layer of each, in order.

        prompts: int64 `[n]` token ids each, run as they are; None for the calibration prompts
        observation_window: queries at the end of a prompt whose attention `window_attention` sums

        The tensors are valid during the call; one layer is held at a time.
        Raises `PluginError` for a source that this probe cannot supply and for a window below 1, before anything runs.
        """

    @abc.abstractmethod
    def loss(self, capacities: Tensor) -> Tensor:
        """Mean loss of each sequence, float64 `[num_sequences]`, nats per scored token.

        capacities: int `[L, H]`, the entries each KV head may keep of `context_length` tokens under the policy that
        the probe is for. Exact: the loss of token-by-token decoding, from the first token on under a window rule, else
        behind a prompt that the policy has compressed once to these capacities.
        """

    @property
    def num_sequences(self) -> int:
        """Sequences that `loss` and `soft_loss` score. Raises `PluginError` where the probe has no `soft_loss`."""
        raise PluginError(f"{type(self).__name__} has no soft_loss: budgets cannot be learned on it")

    def soft_loss(self, bias: ScoreBias, target: SoftTarget = "full", *, sequence: int | None = None) -> Tensor:
        """Mean loss of each sequence under a bias on the attention scores, float32 `[num_sequences]`, differentiable.

        bias: what is added to the scores of each KV head's query group, by the order in which the policy evicts; the
            core adds causality only. It is called for blocks of queries, and again for each block while gradients are
            computed: it has to return the same. Gradients reach whatever it is made of; the model takes part in none.
        target: "full" for the divergence from the full cache, KL(full || biased), nats per scored token;
            "text" for the loss that `loss` measures, nats per scored token
        sequence: the number of one sequence, then `[1]`; None for all of them, whose memory then adds up

        Raises `PluginError` where the probe has none, and for a bias, target or sequence that does not fit.
        """
        raise PluginError(f"{type(self).__name__} has no soft_loss: budgets cannot be learned on it")

    def saved(self) -> Any:
        """What `save` was last given for this `fit`, also by a run that was interrupted; None if nothing was kept."""
        return None

    def save(self, state: Any) -> None:
        """Keeps where a long `fit` is, so that it can go on there. By default nothing is kept.

        state: JSON values
        """
        return

    @property
    def progress(self) -> Progress:
        """Told of long work; by default it says nothing."""
        return Progress()


class _Role(abc.ABC):  # noqa: B024  # abstract through the roles below
    """Common to the three roles; subclasses are frozen dataclasses of JSON-able fields with defaults."""

    def params(self) -> dict[str, Any]:
        """The hyper-parameters, as they go into a plan file."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # the registry admits dataclasses only


class ImportanceEstimator(_Role):
    """Measures how much each KV head matters. Called once per tune or profile.

    token_measure: what `token_maps` gives, in a few words; "" for an estimator that has no maps

    Laws, checked by `kvpolicy.testing.check_estimator`: the result is finite, not negative, of shape
    `[L, H]`, the same for the same probe, of no more forwards than `num_forwards` says, and the probe's
    tensors are left unchanged.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    token_measure: ClassVar[str] = ""

    @abc.abstractmethod
    def estimate(self, probe: ModelProbe) -> Importance:
        """Returns the importance of every KV head of the budgeted layers."""

    def num_forwards(self, spec: ModelSpec, *, prompts: int, sequences: int) -> int:
        """The most forwards of one row that `estimate` runs, so that its cost can be said before it starts.

        prompts:   how many calibration prompts there are, each a forward of `observe`
        sequences: how many sequences `loss` scores, each a forward of every call

        The default fits an estimator that observes the calibration prompts once.
        """
        return prompts

    def token_maps(self, probe: ModelProbe) -> list[Tensor]:
        """What importance is made of, token by token, for pictures: float32 `[L, num_q_heads, n]` of each prompt.

        On the CPU, finite, in one forward of each calibration prompt of n tokens.
        Only called where `token_measure` is not "". Raises `NotImplementedError` unless overridden.
        """
        raise NotImplementedError(f"{type(self).__name__} declares token_measure but does not implement token_maps")


class BudgetAllocator(_Role):
    """Turns importance into shares of a budget. Rounding, floor and ceiling are `apportion`'s.

    needs_importance: False for an allocator that ignores importance
    needs_curves: True for an allocator that works on `Importance.curves`, which few estimators give
    split_scope: "none" for shares fixed in a plan; "layer" or "model" for shares split at run time by `split`

    Laws, checked by `kvpolicy.testing.check_allocator`: shares are finite, >= 0, not all zero, of shape
    `[L, H]`, the same for the same input; arguments are left unchanged.
    """

    needs_importance: ClassVar[bool] = True
    needs_curves: ClassVar[bool] = False
    split_scope: ClassVar[SplitScope] = "none"

    @abc.abstractmethod
    def shares(self, importance: Importance, budget: Budget) -> Tensor:
        """Returns `[L, H]`, >= 0; only proportions count. Called once per trial and per plan."""

    def fit(self, probe: ModelProbe, importance: Importance, budget: Budget) -> Tensor | None:
        """Shares `[L, H]` learned from the model for this budget; the default None means: use `shares`.

        Called once per retention, before the search; what it learned is then measured in one trial. An allocator that
        always learns has no shares without a model: its `shares` raises `PluginError` and says so. Tell
        `probe.progress` of the steps.
        """
        return None

    def split(self, scores: Sequence[Tensor], budget: Budget) -> Tensor:
        """Run-time shares `[B, l + 1, H]` from the scores `[B, H, n]` of layers 0 to l, of what each layer still holds.

        +inf stands for entries that are kept in any case (sink tokens, the recent window), -inf for absent ones and
        for protected spans, which are on top of the budget: sums and means have to leave both out. Under the scope
        "layer" there is one layer, the one that has just run; `budget.shape` is `(l + 1, H)`.

        Only called when `split_scope` is not "none". Raises `NotImplementedError` unless overridden.
        """
        raise NotImplementedError(f"{type(self).__name__} declares split_scope but does not implement split")

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """An instance for one search trial. The default has nothing to search.

        Name each parameter like its field: the search starts from the defaults of the class.
        """
        return cls()


class EvictionPolicy(_Role):
    """Says which entries a KV head gives up. Scores only; larger is kept.

    Sink tokens and the recent window are protected by the cache, whatever the score.

    window_rule: True for a policy that keeps exactly the sink tokens and the most recent; it requires "positions"
    requires:    which of `SOURCES` the policy is given
    new_entry_score: score of an entry that was decoded, until `score_step` changes it; the default keeps decoded
        tokens before any scored one and gives up the oldest of them first. A policy whose `score_step` adds up
        starts from 0.
    num_sink_tokens: first positions that are never evicted
    recent_window:   last positions that are never evicted, as far as the capacity reaches
    observation_window: queries at the end of a prompt whose attention `query_attention` holds and `window_attention`
        sums
    attention_power: each query head's attention is raised to it before a source of attention adds it up; 2 sums squares
    repeat_chunk:    tokens that the model repeats at a time, for `repeat_attention`

    A policy that requires `repeat_attention` is asked once, after the context has been repeated, and may require no
    source of the prompt's own queries and hidden states besides. Tokens that come later enter with `new_entry_score`.
    """

    window_rule: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset()
    new_entry_score: ClassVar[float] = math.inf
    num_sink_tokens: int
    recent_window: int = 0
    observation_window: int = 32
    attention_power: float = 1.0
    repeat_chunk: int = 2048

    @property
    def least_capacity(self) -> int:
        """The fewest entries that a KV head may be given: the sink tokens and one more."""
        return self.num_sink_tokens + 1

    @abc.abstractmethod
    def score_prompt(self, activations: LayerActivations) -> Tensor:
        """Returns `[B, H, n]` float32 over [entries kept so far ; this chunk]. Called after each prefill chunk."""

    def score_step(self, step: DecodeStep) -> Tensor:
        """Returns `[num_entries]` float32. Called after each decoding step; the default keeps the scores."""
        return step.scores
