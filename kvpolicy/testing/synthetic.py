"""A tiny attention model over random activations: what plugin authors test against without loading a model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import BudgetError, PluginError
from kvpolicy.model.layer_spec import LayerSpec
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.activations import LayerActivations, Rotary
from kvpolicy.plugins.layer_gradients import LayerGradients
from kvpolicy.plugins.roles import ModelProbe, ScoreBias, SoftTarget
from kvpolicy.plugins.source_table import NEED_CACHE, SOURCES
from kvpolicy.testing.laws import LawError, snapshot, tensors_of

_OBSERVATION_WINDOW = 8
_NUM_SINK_TOKENS = 4
_LENT = ("output_weight", "rope", "rotary", "module", "layer")  # belong to the model and outlive the call


class SyntheticProbe(ModelProbe):
    """Real attention over random numbers: every field of `LayerActivations` fits every other.

    The tensors given to `visit` are checked for changes when it returns, and then overwritten with NaN, because a
    model reuses that memory: what is needed later must be copied or reduced. The same seed gives the same numbers.
    Before a layer equal tokens are equal, and the layers do not depend on each other.

    num_layers, num_q_heads, num_kv_heads, head_dim: shape of the model; each layer is budgeted
    lengths: tokens of each calibration prompt

    `forwards` counts what was run: one for each prompt that was observed and for each sequence of a loss.
    """

    def __init__(
        self,
        *,
        num_layers: int = 3,
        num_q_heads: int = 6,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        lengths: tuple[int, ...] = (24, 33),
        seed: int = 0,
    ) -> None:
        layer = LayerSpec("full", num_q_heads, num_kv_heads, head_dim, head_dim)
        hidden_size = num_q_heads * head_dim + 4  # differs from heads x dim, so that mixing them up shows
        self._spec = ModelSpec("synthetic", hidden_size, 100, 4096, "default", (layer,) * num_layers)
        self._seed = seed
        self.forwards = 0
        self._prompts = [self._drawn(1, length, number)[0] for number, length in enumerate(lengths)]

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def context_length(self) -> int:
        return 64

    @property
    def least_capacity(self) -> int:
        return _NUM_SINK_TOKENS + 1

    @property
    def prompts(self) -> list[Tensor]:
        return [prompt.clone() for prompt in self._prompts]

    def tokenize(self, text: str) -> Tensor:
        """One token a word."""
        ids = [zlib.crc32(word.encode()) % self._spec.vocab_size for word in text.split()]
        return torch.tensor(ids, dtype=torch.int64)

    def observe(
        self,
        visit: Callable[[LayerActivations], None],
        requires: frozenset[str],
        *,
        prompts: Sequence[Tensor] | None = None,
        observation_window: int = 32,
    ) -> None:
        """Calls `visit` for each layer of each prompt (batch size 1), with the fields in `requires` alone.

        Raises `PluginError` for what only a cache has: nothing is scored, repeated or decoded here.
        """
        supplied = SOURCES - NEED_CACHE
        if missing := sorted(requires - supplied):
            raise PluginError(f"the synthetic probe cannot supply {missing}; it supplies {sorted(supplied)}")
        if observation_window < 1:
            raise PluginError(f"observation_window must be at least 1, got {observation_window}")
        for ids in self._prompts if prompts is None else prompts:
            self.forwards += 1
            for layer in range(self._spec.num_budgeted_layers):
                activations = self._forward(layer, ids[None], requires, observation_window)
                before = snapshot(activations)
                visit(activations)
                _retire(activations, before)

    def activations(
        self, layer: int, *, requires: frozenset[str], batch_size: int = 1, length: int = 24, seed: int = 0
    ) -> LayerActivations:
        """One layer over one batch of `length` random tokens; fields outside `requires` are None.

        Alone in a batch they are the calibration prompt of this length and number `seed`.
        """
        return self._forward(layer, self._drawn(batch_size, length, seed), requires, _OBSERVATION_WINDOW)

    def _drawn(self, batch_size: int, length: int, seed: int) -> Tensor:
        """Token ids [B, n]."""
        generator = torch.Generator().manual_seed(hash((self._seed, seed)) % 2**31)
        return torch.randint(0, self._spec.vocab_size, (batch_size, length), generator=generator)

    def _forward(self, layer: int, ids: Tensor, requires: frozenset[str], window: int) -> LayerActivations:
        """ids: `[B, n]`. Each layer has an embedding of its own, since none runs on what another one left."""
        generator = torch.Generator().manual_seed(hash((self._seed, 0, layer)) % 2**31)
        module = _Attention(self._spec, generator)
        embedding = torch.randn(self._spec.vocab_size, self._spec.hidden_size, generator=generator) + layer
        with torch.no_grad():
            known = module(embedding[ids], window)
        return LayerActivations(layer=layer, **{name: value for name, value in known.items() if name in requires})

    def loss(self, capacities: Tensor) -> Tensor:
        """float64 `[num_prompts]`: falls as any capacity rises. capacities: int `[L, H]`, each above 4 sink tokens."""
        if tuple(capacities.shape) != self._spec.table_shape:
            raise BudgetError(f"capacities have shape {tuple(capacities.shape)}, expected {self._spec.table_shape}")
        if int(capacities.min()) <= _NUM_SINK_TOKENS:
            raise BudgetError(
                f"a KV head needs more than {_NUM_SINK_TOKENS} sink tokens, got a capacity of {int(capacities.min())}"
            )
        self.forwards += len(self._prompts)
        return self._losses(capacities.double())

    @property
    def num_sequences(self) -> int:
        return len(self._prompts)

    def soft_loss(self, bias: ScoreBias, target: SoftTarget = "full", *, sequence: int | None = None) -> Tensor:
        """`loss` at soft capacities: what the last of 64 tokens sees, each other token weighing exp(bias).

        The divergence from the full cache is the loss above that of full capacities.
        """
        if target not in ("full", "text"):
            raise PluginError(f"soft_loss: target must be 'full' or 'text', got {target!r}")
        if sequence is not None and not 0 <= sequence < self.num_sequences:
            raise PluginError(f"soft_loss: there are {self.num_sequences} sequences, from 0; got {sequence}")
        distance = torch.arange(self.context_length).flip(0)
        rank = distance.masked_fill(distance >= self.context_length - _NUM_SINK_TOKENS, -1)[None, None]
        (layers, heads), shape = self._spec.table_shape, (self._spec.num_kv_heads, 1, len(distance))
        seen = [bias(layer, rank) for layer in range(layers)]
        for layer, part in enumerate(seen):
            if tuple(part.shape) != shape:
                raise PluginError(
                    f"soft_loss: the bias of layer {layer} has shape {list(part.shape)}, expected [KV heads, queries, "
                    f"keys] = {list(shape)}"
                )
        losses = self._losses(torch.stack(seen).double().exp().sum((-2, -1)))
        if target == "full":
            losses = losses - self._losses(torch.full((layers, heads), float(len(distance)), dtype=torch.float64))
        return (losses if sequence is None else losses[sequence : sequence + 1]).float()

    @property
    def num_scored(self) -> int:
        return 1

    def observe_gradients(self, visit: Callable[[LayerGradients], None], *, sequence: int, seed: int = 0) -> None:
        """Attention of the layers' own, and gradients drawn at random."""
        if not 0 <= sequence < self.num_sequences:
            raise PluginError(f"observe_gradients: there are {self.num_sequences} sequences, from 0; got {sequence}")
        self.forwards += 1
        generator = torch.Generator().manual_seed(hash((self._seed, sequence, seed)) % 2**31)
        ids = self._prompts[sequence][None]
        distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        rank = distance.clamp(min=0).masked_fill(torch.arange(ids.shape[1]) < _NUM_SINK_TOKENS, -1)[None]
        for layer in reversed(range(self._spec.num_budgeted_layers)):
            known = self._forward(layer, ids, frozenset({"queries", "keys", "values"}), _OBSERVATION_WINDOW)
            q, k = known.queries[0], known.keys[0].repeat_interleave(self._spec.group_size, 0)
            weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(distance < 0, -math.inf).softmax(-1)
            gradients = torch.randn(q.shape, generator=generator)
            visit(LayerGradients(layer, 0, gradients, known.values[0], _blocks_of(weights), _blocks_of(rank)))

    def _losses(self, capacities: Tensor) -> Tensor:
        """float64 `[num_prompts]`; capacities: float64 `[L, H]`."""
        weight = torch.arange(1, capacities.numel() + 1, dtype=torch.float64).reshape(capacities.shape)
        excess = (weight / (1 + capacities)).mean()
        return torch.stack([2 + (1 + 0.1 * prompt) * excess for prompt in range(len(self._prompts))])


def _blocks_of(whole: Tensor) -> Callable[[int, int], Tensor]:
    """Some queries' rows up to the last of them, as copies. whole: [heads, T, T]"""
    return lambda begin, end: whole[:, begin:end, :end].clone()


class _Attention(nn.Module):
    """Projections and causal attention of one layer, with the attribute names of transformers."""

    def __init__(self, spec: ModelSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.num_q_heads, self.num_kv_heads, self.head_dim = spec.num_q_heads, spec.num_kv_heads, spec.head_dim
        hidden, inner = spec.hidden_size, spec.num_q_heads * spec.head_dim
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, spec.num_kv_heads * spec.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, spec.num_kv_heads * spec.head_dim, bias=False)
        self.o_proj = nn.Linear(inner, hidden, bias=False)
        for weight in self.parameters():
            weight.requires_grad_(False).copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(hidden))

    def forward(self, hidden: Tensor, window: int) -> dict[str, Any]:
        """hidden: `[B, n, hidden_size]`. Returns the fields of `LayerActivations` by name."""
        batch, length, _ = hidden.shape
        inputs = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
        rope = self._rope(length)
        queries = _rotate(self._heads(self.q_proj(inputs)), rope)
        keys, values = _rotate(self._heads(self.k_proj(inputs)), rope), self._heads(self.v_proj(inputs))
        group = self.num_q_heads // self.num_kv_heads
        scores = queries @ keys.repeat_interleave(group, 1).mT / math.sqrt(self.head_dim)
        mass = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
        output = mass @ values.repeat_interleave(group, 1)
        by_group = mass.reshape(batch, self.num_kv_heads, group, length, length).sum(2)
        return {
            "queries": queries,
            "keys": keys,
            "values": values,
            "output": output,
            "hidden_before": hidden,
            "attention_input": inputs,
            "hidden_after": hidden + self.o_proj(output.transpose(1, 2).flatten(2)),
            "output_weight": self.o_proj.weight,
            "positions": torch.arange(length).repeat(batch, self.num_kv_heads, 1),
            "scores": torch.zeros(batch, self.num_kv_heads, length),
            "capacity": torch.full((batch, self.num_kv_heads), length // 2),
            "query_attention": by_group[:, :, -window:],
            "window_attention": by_group[:, :, -window:].sum(2),
            "full_attention": by_group.sum(2),
            "repeat_attention": mass.reshape(batch, self.num_kv_heads, -1, length).amax(2),
            "rope": rope,
            "rotary": self._rotary(),
            "scale": self.head_dim**-0.5,
            "module": self,
        }

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:2], -1, self.head_dim).transpose(1, 2).contiguous()

    def _rotary(self) -> Rotary:
        first, second = torch.arange(self.head_dim).chunk(2)
        return Rotary(first, second, 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim))

    def _rope(self, length: int) -> tuple[Tensor, Tensor]:
        angle = torch.arange(length)[:, None] * self._rotary().frequencies
        return torch.cat([angle.cos(), angle.cos()], -1)[None], torch.cat([angle.sin(), angle.sin()], -1)[None]


def _rotate(states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    low, high = states.chunk(2, -1)
    return states * rope[0] + torch.cat([-high, low], -1) * rope[1]


def _retire(activations: LayerActivations, before: dict[str, Tensor]) -> None:
    for name, value in tensors_of(activations):
        if not torch.equal(value, before[name]):
            raise LawError(
                f"the probe's `{name}` of layer {activations.layer} was changed in place; the model goes on computing "
                "with that tensor. Work on a copy, and avoid methods that end in '_'"
            )
        if name.partition(".")[0] not in _LENT:
            value.fill_(math.nan if value.is_floating_point() else -1)
