"""A transformers model as a `ModelProbe`, whatever a table of capacities means to its losses."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.budget.entry_format import (
    MODEL,
    Format,
    LayerFormats,
    check_format,
    exact_recent,
    is_centred,
    is_thin,
    name_of,
    of_layer,
)
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import BudgetError, ModelError, PluginError
from kvpolicy.integrations.transformers.attention.attention_call import Handler
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules, decoder_layers
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.integrations.transformers.attention.key_centre import key_centres
from kvpolicy.integrations.transformers.attention.observe import SUPPLIED, LayerObserver
from kvpolicy.integrations.transformers.attention.rotary import find_rotary
from kvpolicy.integrations.transformers.attention.soft_attention import BiasedAttention, PositionBias, biased
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.probes.exchanged_entries import exchanging
from kvpolicy.integrations.transformers.probes.teacher import Teacher, divergence
from kvpolicy.integrations.transformers.probes.watched import WatchedAttention
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.layer_gradients import LayerGradients
from kvpolicy.plugins.roles import BudgetAllocator, ModelProbe, ScoreBias, SoftTarget
from kvpolicy.plugins.source_table import listed
from kvpolicy.progress import Progress
from kvpolicy.text.corpus import Tokenize

_LOSS_ROWS = 256  # rows of logits turned into losses at a time: 50 MB in fp32 for a vocabulary of 49152


class SequenceProbe(ModelProbe):
    """Calibration prompts and sequences run through a transformers model. What is evicted, its leaves say.

    sequences:       int64 [N, T], what `loss` scores, from position `first_scored` on
    num_sink_tokens: first tokens that are never evicted
    prefill_length:  tokens at the start that attend densely
    model, prompts, tokenize, batch_size, progress, entry_format, shared_layers: as for `TransformersProbe`

    protocol:  "window" where every token is decoded under the budget, "prompt" where a prompt is compressed once
    allocator: splits a table's total at run time; None where a table is kept as it is
    """

    protocol: ClassVar[str]
    allocator: BudgetAllocator | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        prompts: Sequence[Tensor] = (),
        *,
        tokenize: Tokenize | None = None,
        num_sink_tokens: int = 4,
        prefill_length: int = 0,
        batch_size: int = 1,
        progress: Progress | None = None,
        entry_format: Format = None,
        shared_layers: Mapping[int, int] | None = None,
    ) -> None:
        for ids in (sequences, *(prompt[None] if prompt.ndim == 1 else prompt for prompt in prompts)):
            check_token_ids(model, ids, "sequences and prompts")
        self.model = model
        self.sequences = sequences
        self._prompts = list(prompts)
        self._tokenize = tokenize
        self._num_sink_tokens = num_sink_tokens
        self.prefill_length = prefill_length
        self.batch_size, self.entry_format = batch_size, entry_format
        self._progress = progress or Progress()
        self._teacher = Teacher(self.scored_logits, sequences)
        self.shared_layers = dict(shared_layers or {})
        self._spec = ModelSpec.from_config(model.config).sharing(self.shared_layers)
        check_format(entry_format, self._spec)
        if self.protocol == "window" and is_thin(entry_format):
            raise BudgetError(
                f"format={name_of(entry_format)}: a prompt's queries choose which key channels are kept, and where "
                "every token is decoded under the budget there is none: measure behind a prompt, under another policy"
            )
        budgeted = self._spec.budgeted_layers
        self._modules = attention_modules(model, budgeted)
        # layers that reuse a budgeted layer's keys and values see what that layer keeps
        sharing = {
            i: budgeted.index(x.shared_with) for i, x in enumerate(self._spec.layers) if x.shared_with in budgeted
        }
        followers = attention_modules(model, list(sharing))
        self._windowed = [(module, row) for row, (module, _) in enumerate(self._modules)]
        self._windowed += [(module, row) for (module, _), row in zip(followers, sharing.values(), strict=True)]
        with intercepted(model, {}):  # refuses here what could not be probed later
            pass

    @property
    @abc.abstractmethod
    def described(self) -> str:
        """What `loss` measures, in words."""

    @property
    @abc.abstractmethod
    def first_scored(self) -> int:
        """The position of the first token whose loss counts."""

    @abc.abstractmethod
    def filled(self, capacities: Tensor) -> RaggedStore:
        """A store as the first sequence leaves it, or its prompt. capacities: int `[L, H]`."""

    @abc.abstractmethod
    def seconds(self, forward: float) -> float:
        """What a sequence takes in a trial of a search, on average.

        forward: seconds of one forward of a whole sequence
        """

    @abc.abstractmethod
    def _batch_losses(self, index: int, ids: Tensor, capacities: Tensor) -> Tensor:
        """Losses float32 `[B, T - first_scored]` of one batch. ids: `[B, T]` on the model's device."""

    @abc.abstractmethod
    def _is_exact(self, q_pos: Tensor, kv_pos: Tensor, recent: int) -> Tensor:
        """See `IsExact`, under a format that leaves the last `recent` tokens as they came."""

    @abc.abstractmethod
    def _ranks(self, sequence: int) -> PositionBias:
        """The ranks of a sequence's entries, see `ScoreBias`, by the positions of queries and keys."""

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def formats(self) -> tuple[str, ...]:
        return (MODEL if isinstance(self.entry_format, LayerFormats) else name_of(self.entry_format),)

    @property
    def num_sink_tokens(self) -> int:
        return self._num_sink_tokens

    @property
    def least_capacity(self) -> int:
        return self.num_sink_tokens + max(exact_recent(self.entry_format), 1)

    @property
    def prompts(self) -> list[Tensor]:
        return self._prompts

    def tokenize(self, text: str) -> Tensor:
        if self._tokenize is None:
            raise PluginError(
                f"this probe has no tokenizer, and was asked for the tokens of {text[:40]!r}: make it with "
                "TransformersProbe(..., tokenize=corpus.tokenize)"
            )
        return torch.tensor(self._tokenize(text), dtype=torch.int64)

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)

    @property
    def progress(self) -> Progress:
        return self._progress

    def observe(
        self,
        visit: Callable[[LayerActivations], None],
        requires: frozenset[str],
        *,
        prompts: Sequence[Tensor] | None = None,
        observation_window: int = 32,
    ) -> None:
        missing = requires - SUPPLIED
        if missing:
            raise PluginError(f"the profiling run cannot supply {listed(missing)}; it supplies {listed(SUPPLIED)}")
        if observation_window < 1:
            raise PluginError(f"observation_window must be at least 1, got {observation_window}")
        if "rotary" in requires:
            find_rotary(self.model, [attention for attention, _ in self._modules])
        run = self._prompts if prompts is None else prompts
        observers = [
            LayerObserver(index, self._spec, attention, block, requires, visit, observation_window)
            for index, (attention, block) in enumerate(self._modules)
        ]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._answered_by({observer.attention: observer for observer in observers}))
            for observer in observers:
                stack.enter_context(observer.hooked())
            for prompt in run:
                # one row of logits is enough; the hidden states have been seen by then
                self.model(prompt[None].to(self.model.device), use_cache=False, **keep_logits(self.model))
        self._check_reached([observer.calls for observer in observers], len(run))

    def _answered_by(self, handlers: Mapping[nn.Module, Handler]) -> AbstractContextManager[None]:
        """Within the context these answer for attention, under the map of layers that share."""
        return intercepted(self.model, exchanging(self.model, self._spec, self.shared_layers, handlers))

    def loss(self, capacities: Tensor) -> Tensor:
        return torch.cat([losses.double().mean(1) for losses in self.token_losses(capacities)])

    def full_loss(self) -> Tensor:
        """Mean loss of each sequence with nothing evicted, float64 `[num_sequences]`."""
        return self.loss(torch.full(self._spec.table_shape, self.context_length))

    def token_losses(self, capacities: Tensor) -> Iterator[Tensor]:
        """Losses of the scored tokens, float32 `[batch, T - first_scored]` on the CPU, one batch after another.

        A generator, so that a search can stop after any batch.
        """
        self._check(capacities)
        for index, batch in enumerate(torch.split(self.sequences, self.batch_size)):
            with torch.no_grad():
                losses = self._batch_losses(index, batch.to(self.model.device), capacities)
            yield losses.cpu()

    def losses_of(self, ids: Tensor) -> Tensor:
        """Losses float32 `[B, T - first_scored]` under whatever attention the model has now. ids: `[B, T]`."""
        first = self.first_scored
        return losses_from(self.scored_logits(ids), ids[:, first:])

    def scored_logits(self, ids: Tensor) -> Tensor:
        """Logits `[B, T - first_scored, vocabulary]`: of the tokens that predict a scored one, and no others."""
        first, length = self.first_scored - 1, ids.shape[1]
        # by index: given a number, Gemma 4 shortens the queries of its last layers too, to what no mask was made for
        rows = torch.arange(first, length, device=ids.device)
        out = self.model(ids, use_cache=False, **keep_logits(self.model, rows))
        logits: Tensor = out.logits[:, first - length : -1]
        return logits

    def soft_loss(self, bias: ScoreBias, target: SoftTarget = "full", *, sequence: int | None = None) -> Tensor:
        """As in `ModelProbe`. The full cache's logits are kept from their first use, up to 1 GiB of them."""
        if target not in ("full", "text"):
            raise PluginError(f"soft_loss: target must be 'full' or 'text', got {target!r}")
        self._check_own_entries("soft_loss")
        chosen = range(self.num_sequences) if sequence is None else [sequence]
        if not all(0 <= index < self.num_sequences for index in chosen):
            raise PluginError(f"soft_loss: there are {self.num_sequences} sequences, from 0; got {sequence}")
        return torch.stack([self._soft_loss(bias, target, index) for index in chosen])

    @property
    def num_scored(self) -> int:
        return int(self.sequences.shape[1]) - self.first_scored

    def observe_gradients(self, visit: Callable[[LayerGradients], None], *, sequence: int, seed: int = 0) -> None:
        self._check_own_entries("observe_gradients")
        if not 0 <= sequence < self.num_sequences:
            raise PluginError(f"observe_gradients: there are {self.num_sequences} sequences, from 0; got {sequence}")
        ids, ranks = self.sequences[sequence : sequence + 1].to(self.model.device), self._ranks(sequence)
        centres = key_centres(self.model, self._spec)  # of any format that is asked about
        handlers = [
            WatchedAttention(module, self._spec, row, ranks, self.prefill_length, visit, self._is_exact, centres[row])
            for module, row in self._windowed
        ]
        with torch.enable_grad(), biased(self.model, handlers, decoder_layers(self.model, self._modules[0][1])):
            logits = self.scored_logits(ids)
            drawn = drawn_tokens(logits.detach(), seed)
            loss = losses_from(logits, drawn).sum()
        self._check_reached([handler.calls for handler in handlers], 1)
        loss.backward()  # type: ignore[no-untyped-call]

    def _key_centres(self) -> list[KeyCentre | None]:
        """As `key_centres`, of today's weights, where the entries' format wants them."""
        wanted = is_centred(self.entry_format)
        return key_centres(self.model, self._spec) if wanted else [None] * self._spec.num_budgeted_layers

    def _check_own_entries(self, what: str) -> None:
        if self.shared_layers:
            raise PluginError(
                f"{what} is that of layers with entries of their own, and {sorted(self.shared_layers)} have none "
                "(shared_layers): learn or measure without them"
            )
        if is_thin(self.entry_format):
            raise PluginError(
                f"{what} is that of whole keys, and under format={name_of(self.entry_format)} they lose channels: "
                "learn or measure without a format"
            )

    def _soft_loss(self, bias: ScoreBias, target: SoftTarget, index: int) -> Tensor:
        device = self.model.device
        ids = self.sequences[index : index + 1].to(device)
        teacher = self._teacher(index, device) if target == "full" else None
        ranks = self._ranks(index)

        def by_position(layer: int, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
            return bias(layer, ranks(layer, q_pos, kv_pos))

        handlers, length, centres = [], self.prefill_length, self._key_centres()
        for module, row in self._windowed:
            own = of_layer(self.entry_format, row)
            is_exact = None if own is None else partial(self._is_exact, recent=own.exact_recent)
            handlers.append(BiasedAttention(module, self._spec, row, by_position, length, own, is_exact, centres[row]))
        with biased(self.model, handlers, decoder_layers(self.model, self._modules[0][1])):
            loss = self.losses_of(ids).mean() if teacher is None else divergence(teacher, self.scored_logits(ids)[0])
        self._check_reached([handler.calls for handler in handlers], 1)
        return loss

    def _check(self, capacities: Tensor) -> None:
        """Raises `BudgetError` for a table that this model and this rule cannot have."""
        if tuple(capacities.shape) != self._spec.table_shape:
            raise BudgetError(
                f"capacities have shape {tuple(capacities.shape)}, this model has (layers, KV heads) = "
                f"{self._spec.table_shape}"
            )
        if int(capacities.min()) <= self.num_sink_tokens:
            raise BudgetError(
                f"a KV head needs more than the {self.num_sink_tokens} sink tokens, got a capacity of "
                f"{int(capacities.min())}"
            )

    def _check_reached(self, calls: list[int], expected: int) -> None:
        """Never silently not applied: every layer's attention that we exchange must have gone through us."""
        for index, count in enumerate(calls):
            if count != expected:
                raise ModelError(
                    f"{type(self.model).__name__}: the attention of budgeted layer {index} was reached {count} times "
                    f"in {expected} forwards: this model cannot be probed"
                )


def drawn_tokens(logits: Tensor, seed: int) -> Tensor:
    """A token of each position from the model's own prediction, int64 `[B, n]`. logits: `[B, n, vocabulary]`"""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.split(logits.reshape(-1, logits.shape[-1]), _LOSS_ROWS)
    drawn = [torch.multinomial(x.float().softmax(-1).cpu(), 1, generator=generator) for x in parts]
    return torch.cat(drawn).reshape(logits.shape[:2]).to(logits.device)


def losses_from(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses float32 `[B, n]`. logits: `[B, n, vocabulary]`, each position's before its target;  targets: `[B, n]`."""
    rows = logits.reshape(-1, logits.shape[-1])
    parts = zip(torch.split(rows, _LOSS_ROWS), torch.split(targets.reshape(-1), _LOSS_ROWS), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in parts]).reshape(targets.shape)
