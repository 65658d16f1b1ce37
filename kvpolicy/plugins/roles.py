"""The three roles of a method; `task_role` has that of a task.

A plugin object is a frozen dataclass whose fields are JSON-able hyper-parameters with defaults. It keeps no
state between calls. Selection, movement, rounding, sink protection are the core's.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from kvpolicy.errors import PluginError
from kvpolicy.progress import Progress

if TYPE_CHECKING:  # a list of the plugins needs no torch
    from torch import Tensor

    from kvpolicy.model.spec import Budget, Importance, ModelSpec
    from kvpolicy.plugins.activations import LayerActivations, LayerStatistics
    from kvpolicy.plugins.decode_step import DecodeStep
    from kvpolicy.plugins.layer_gradients import LayerGradients

SplitScope = Literal["none", "layer", "model"]
SoftTarget = Literal["full", "text"]
ScoreBias = Callable[[int, "Tensor"], "Tensor"]
"""`bias(layer, rank)`: budgeted layer, int64 `[H or 1, q, k]` -> float32 `[H, q, k]`.

The rank of an entry is how many others that may be evicted outlive it, and -1 where it is never evicted: a KV head of
capacity c keeps what ranks below c less the sink tokens. Under the window rule the rank is the distance from the query.
"""


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
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that entries may have: estimators of curves measure each of them, the first for
        `Importance.curves`.
        """
        return ("model",)

    @property
    def num_sink_tokens(self) -> int:
        """First tokens that are never evicted, inside every capacity."""
        return self.least_capacity - 1

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

    def observe_gradients(self, visit: Callable[[LayerGradients], None], *, sequence: int, seed: int = 0) -> None:
        """One forward and one backward of a sequence with nothing evicted; `visit` is called once for each attention
        that reads entries of a budgeted layer, the last layer first.

        The loss is that of tokens which the model draws from its own predictions, the sum over the scored positions in
        nats: the products of its gradients are what a divergence from the full cache is made of (Fisher information).

        sequence: its number;  seed: of the draws

        The tensors are valid during the call; one layer is held at a time.
        Raises `PluginError` where the probe has none, and for a sequence that there is not.
        """
        raise PluginError(f"{type(self).__name__} has no gradients")

    @property
    def num_scored(self) -> int:
        """Tokens of a sequence that `loss`, `soft_loss` and `observe_gradients` score."""
        raise PluginError(f"{type(self).__name__} does not say how many tokens it scores")

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
    measures_formats: whether there are `Importance.format_curves` where a probe names several formats

    Laws, checked by `kvpolicy.testing.check_estimator`: the result is finite, not negative, of shape
    `[L, H]`, the same for the same probe, of no more forwards than `num_forwards` says, and the probe's
    tensors are left unchanged.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    token_measure: ClassVar[str] = ""
    measures_formats: ClassVar[bool] = False

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
    requires:    what `split` is told beside scores, fields of `LayerStatistics`

    Laws, checked by `kvpolicy.testing.check_allocator`: shares are finite, >= 0, not all zero, of shape
    `[L, H]`, the same for the same input; arguments are left unchanged.
    """

    needs_importance: ClassVar[bool] = True
    needs_curves: ClassVar[bool] = False
    split_scope: ClassVar[SplitScope] = "none"
    requires: ClassVar[frozenset[str]] = frozenset()

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

    def split(self, scores: Sequence[Tensor], budget: Budget, *statistics: LayerStatistics) -> Tensor:
        """Run-time shares `[B, l + 1, H]` from the scores `[B, H, n]` of layers 0 to l, of what each layer still holds.

        +inf stands for entries that are kept in any case (sink tokens, the recent window), -inf for absent ones and
        for protected spans, which are on top of the budget: sums and means have to leave both out. Under the scope
        "layer" there is one layer, the one that has just run; `budget.shape` is `(l + 1, H)`.

        statistics: of as many layers as there are scores, where `requires` is not empty; else none are given

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
    requires:    what the policy is given, of `kvpolicy.plugins.source_table`
    new_entry_score: score of an entry that was decoded, until `score_step` changes it; the default keeps decoded
        tokens before any scored one and gives up the oldest of them first. A policy whose `score_step` adds up
        starts from 0.
    num_sink_tokens: first positions that are never evicted
    recent_window:   last positions that are never evicted, as far as the capacity reaches
    observation_window: queries at the end of a prompt whose attention `query_attention` holds and `window_attention`
        sums
    attention_power: each query head's attention is raised to it before a source of attention adds it up; 2 sums squares
    repeat_chunk:    tokens that the model repeats at a time, for `repeat_attention`

    All of it is read from the object, so that one policy can wrap another (`WrappingPolicy`).

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
    def rescores(self) -> bool:
        """Whether `score_step` has something to say: only then is it asked. The default: whether the class has one."""
        return type(self).score_step is not EvictionPolicy.score_step

    @property
    def least_capacity(self) -> int:
        """The fewest entries that a KV head may be given: the sink tokens and one more."""
        return self.num_sink_tokens + 1

    @abc.abstractmethod
    def score_prompt(self, activations: LayerActivations) -> Tensor:
        """Returns `[B, H, n]` float32 over [entries kept so far ; this chunk]. Called after each prefill chunk."""

    def score_step(self, step: DecodeStep) -> Tensor:
        """Returns `[R]` float32, for each row of the arena; the default keeps the scores.

        Called after each decoding step. May not wait for the device: no `.item()`, no shape that depends on values.
        """
        return step.scores

    @classmethod
    def suggest(cls, trial: Trial) -> Self:
        """An instance for one search trial. The default has nothing to search.

        Name each parameter like its field: the search starts from the defaults of the class. It is run once for all
        retentions, and not at all where a user gives parameters. `window_rule` must be the same for all instances.
        """
        return cls()
