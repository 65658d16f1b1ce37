"""The loss of decoding from the first token on, under the window rule."""

from __future__ import annotations

from typing import ClassVar

from kvpolicy_kernels.formats import EntryFormat
from kvpolicy_kernels.key_centre import KeyCentre
from kvpolicy_kernels.window_attention import coded_window_attention, window_attention
from torch import Tensor, nn

from kvpolicy.budget.entry_format import name_of, of_layer
from kvpolicy.cache.schedule import Fixed
from kvpolicy.cache.scoring import Scoring
from kvpolicy.cache.store import RaggedStore
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall, as_answer
from kvpolicy.integrations.transformers.attention.observe import check_heads
from kvpolicy.integrations.transformers.attention.soft_attention import PositionBias
from kvpolicy.integrations.transformers.probes.base import SequenceProbe
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.registry import registry


class TransformersProbe(SequenceProbe):
    """Calibration prompts and sequences run through a transformers model; losses are those of the window rule.

    model:           any causal language model whose attention goes through `AttentionInterface`
    sequences:       int64 [N, T], what `loss` scores; tokens at positions >= T // 4 are scored
    prompts:         token tensors [n] of different lengths, what `observe` runs unless it is given others
    tokenize:        text to token ids without special tokens, for estimators that make prompts of their own
    num_sink_tokens: of the window rule
    prefill_length:  tokens at the start that attend densely (`tokens at positions >= max(T // 4, prefill_length)`
                     are scored then)
    batch_size:      sequences in one forward of `loss`
    progress:        told of long work, such as an allocator's learning
    entry_format:    of a cache's entries, one for all layers or one for each; None for the model's dtype
    shared_layers:   layers that keep no entries, as for `new_cache`; tables are those of the others

    Raises `ModelError` for a model whose attention cannot be probed, before anything runs.
    """

    protocol: ClassVar[str] = "window"

    @property
    def context_length(self) -> int:
        return int(self.sequences.shape[1])

    @property
    def first_scored(self) -> int:
        return max(self.context_length // 4, self.prefill_length, 1)

    @property
    def described(self) -> str:
        prompt = f"a prompt of {self.prefill_length} tokens attends densely, then " if self.prefill_length else ""
        kept = "" if self.entry_format is None else f", entries in {name_of(self.entry_format)}"
        return (
            f"{prompt}every token is decoded under the budget (window rule){kept}; tokens from position "
            f"{self.first_scored} to {self.sequences.shape[1] - 1} are scored"
        )

    def filled(self, capacities: Tensor) -> RaggedStore:
        """A store under the window rule that has seen the first sequence. capacities: int `[L, H]`."""
        policy = registry.create("policy", "streaming", {"num_sink_tokens": self.num_sink_tokens})
        store = RaggedStore(
            self.spec,
            Fixed(capacities),
            policy,
            entry_format=self.entry_format,
            key_centres=self._key_centres(),
        )

        def fill(activations: LayerActivations) -> None:
            query, key, value = activations.queries, activations.keys, activations.values
            store.keep(activations.layer, query, store.arrive(activations.layer, key, value), Scoring())

        self.observe(fill, frozenset({"queries", "keys", "values"}), prompts=[self.sequences[0]])
        return store

    def seconds(self, forward: float) -> float:
        """One forward."""
        return forward

    def _batch_losses(self, index: int, ids: Tensor, capacities: Tensor) -> Tensor:
        rows, centres = capacities.tolist(), self._key_centres()
        handlers = [
            _WindowAttention(
                module,
                self._spec,
                rows[row],
                self.num_sink_tokens,
                self.prefill_length,
                of_layer(self.entry_format, row),
                centres[row],
            )
            for module, row in self._windowed
        ]
        with self._answered_by({handler.module: handler for handler in handlers}):
            losses = self.losses_of(ids)
        self._check_reached([handler.calls for handler in handlers], 1)
        return losses

    def _is_exact(self, q_pos: Tensor, kv_pos: Tensor, recent: int) -> Tensor:
        query = q_pos[:, None]
        newest = (kv_pos < self.num_sink_tokens) | (query - kv_pos < recent)
        return (newest & (recent > 0)) | (query < 1)  # a first token is a prompt of one

    def _ranks(self, sequence: int) -> PositionBias:
        """By distance."""

        def distance(layer: int, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
            rank = (q_pos[:, None] - kv_pos).clamp(min=0)
            return rank.masked_fill(kv_pos < self.num_sink_tokens, -1)[None]

        return distance


class _WindowAttention:
    """The window rule in place of one layer's causal attention."""

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        capacities: list[int],
        num_sink_tokens: int,
        prefill_length: int,
        entry_format: EntryFormat | None,
        key_centre: KeyCentre | None,
    ) -> None:
        self.module, self.spec, self.capacities = module, spec, capacities
        self.num_sink_tokens, self.prefill_length, self.entry_format = num_sink_tokens, prefill_length, entry_format
        self.key_centre, self.calls = key_centre, 0

    def __call__(self, call: AttentionCall) -> Answer:
        check_heads(call, self.spec)
        self.calls += 1
        if self.entry_format is not None:
            out = coded_window_attention(
                call.query,
                call.key,
                call.value,
                self.capacities,
                self.num_sink_tokens,
                self.entry_format,
                prefill_length=self.prefill_length,
                key_centre=self.key_centre,
                **call.scoring.options(),
            )
            return as_answer(out)
        if min(self.capacities) >= call.query.shape[2]:
            return call.stock()  # nothing is evicted: the model's own attention is the answer
        out = window_attention(
            call.query,
            call.key,
            call.value,
            self.capacities,
            self.num_sink_tokens,
            prefill_length=self.prefill_length,
            **call.scoring.options(),
        )
        return as_answer(out)
