"""Handing each layer's activations to a visitor while the model runs.

Everything is only read: the logits stay bit-identical.

The residual stream after attention has a different name in each architecture, or none. It is found by identity:
after the attention module, the first child of the decoder layer whose input is not what came out of attention (nor
out of a norm or dropout applied to that) is given the sum. In parallel blocks, where the child is given attention's
own input, and where no child follows, it is residual + attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kvpolicy_kernels.column_scores import column_scores
from kvpolicy_kernels.segments import Chunk, Segments
from torch import Tensor, nn

from kvpolicy.errors import ModelError
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall
from kvpolicy.integrations.transformers.attention.rotary import rotary_of
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.activations import LayerActivations
from kvpolicy.plugins.source_table import supplied_by

SUPPLIED = supplied_by("probe")
_HIDDEN = {"hidden_before", "attention_input", "hidden_after", "rope"}
_OUTLIVE_THE_LAYER = {"rope", "rotary", "output_weight"}  # later layers, or later forwards, use them


class LayerObserver:
    """Collects one layer's activations during its forward and hands them over when the layer is done."""

    def __init__(
        self,
        layer: int,
        spec: ModelSpec,
        attention: nn.Module,
        block: nn.Module,
        requires: frozenset[str],
        visit: Callable[[LayerActivations], None],
        observation_window: int = 32,
    ) -> None:
        self.layer, self.spec, self.requires, self.visit = layer, spec, requires, visit
        self.observation_window = observation_window
        self.attention, self.block = attention, block
        self.seen: dict[str, Any] = {}
        self.chain: list[Tensor] = []
        self.calls = 0

    def __call__(self, call: AttentionCall) -> Answer:
        check_heads(call, self.spec)
        answer = call.stock()
        self.calls += 1
        self.seen |= {"queries": call.query, "keys": call.key, "values": call.value}
        self.seen["output"] = answer[0].transpose(1, 2)
        scale = call.scoring.scale
        self.seen["scale"] = call.query.shape[-1] ** -0.5 if scale is None else scale
        if "window_attention" in self.requires:
            self.seen["window_attention"] = _mass(call, self.observation_window)
        if "full_attention" in self.requires:
            self.seen["full_attention"] = _mass(call, call.query.shape[2])
        return answer

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Installs the hooks that see the hidden states; removes them again."""
        handles = [self.block.register_forward_hook(self._block_done)]
        if self.requires & _HIDDEN:
            handles += [
                self.block.register_forward_pre_hook(self._block_begins, with_kwargs=True),
                self.attention.register_forward_pre_hook(self._attention_begins, with_kwargs=True),
                self.attention.register_forward_hook(self._attention_done),
            ]
            for child in self.block.children():
                if child is not self.attention:
                    handles.append(child.register_forward_pre_hook(self._child_begins, with_kwargs=True))
                    handles.append(child.register_forward_hook(self._child_done))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.seen, self.chain = {}, []

    def _block_begins(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen, self.chain = {"hidden_before": hidden_of(args, kwargs)}, []

    def _attention_begins(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen |= {"attention_input": hidden_of(args, kwargs), "rope": kwargs.get("position_embeddings")}

    def _attention_done(self, _: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        self.chain = [result[0] if isinstance(result, tuple) else result]

    def _child_begins(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.chain or "hidden_after" in self.seen:
            return
        hidden = hidden_of(args, kwargs)
        if hidden is self.seen["attention_input"]:
            self.seen["hidden_after"] = self._sum()
        elif not any(hidden is link for link in self.chain):
            self.seen["hidden_after"] = hidden

    def _child_done(self, _: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self.chain and "hidden_after" not in self.seen and args and any(args[0] is link for link in self.chain):
            self.chain.append(result)

    def _sum(self) -> Tensor:
        total: Tensor = self.seen["hidden_before"] + self.chain[-1]
        return total

    def _block_done(self, *_: Any) -> None:
        if "hidden_after" in self.requires and "hidden_after" not in self.seen:
            self.seen["hidden_after"] = self._sum()
        if "output_weight" in self.requires:
            self.seen["output_weight"] = output_weight(self.attention, self.spec)
        if "rotary" in self.requires:
            self.seen["rotary"] = rotary_of(self.attention)
        self.seen["module"] = self.attention
        sources = {name: self.seen[name] for name in self.requires}
        sources |= {name: plugin_call.lent(sources[name]) for name in _OUTLIVE_THE_LAYER & sources.keys()}
        self.seen, self.chain = {}, []
        self.visit(LayerActivations(layer=self.layer, **sources))


def _mass(call: AttentionCall, window: int) -> Tensor:
    """Causal attention that each of n tokens gets from the last `window` queries, summed over these and the group.

    Returns [B, H, n].
    """
    key, value, query = call.key, call.value, call.query[:, :, -window:]
    empty = torch.zeros(key.shape[0] * key.shape[1], dtype=torch.int64)  # no entries besides these tokens
    nothing = Segments(key.new_empty(0, key.shape[-1]), value.new_empty(0, value.shape[-1]), empty, empty)
    return column_scores(query, nothing, Chunk(key, value), **call.scoring.options())


def check_heads(call: AttentionCall, spec: ModelSpec) -> None:
    """Raises `ModelError` when the attention function is given other heads than the configuration says."""
    queries, keys = call.query.shape[1], call.key.shape[1]
    if queries != spec.num_q_heads or keys != spec.num_kv_heads:
        raise ModelError(
            f"{type(call.module).__name__} gives its attention {queries} query and {keys} KV heads, its configuration "
            f"says {spec.num_q_heads} and {spec.num_kv_heads}: this attention cannot be probed"
        )


def output_weight(attention: nn.Module, spec: ModelSpec) -> Tensor:
    """The output projection [hidden_size, num_q_heads * value_dim]; raises `ModelError` if there is no plain one."""
    width = spec.num_q_heads * spec.attention.value_dim
    for name in ("o_proj", "out_proj", "dense", "c_proj", "wo"):
        child = getattr(attention, name, None)
        if isinstance(child, nn.Linear) and child.weight.dim() == 2 and child.weight.shape[1] == width:
            return child.weight
    raise ModelError(f"{type(attention).__name__} has no plain linear output projection over {width} inputs")


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states of a module call: the first positional argument, or the keyword of that name."""
    return args[0] if args else kwargs.get("hidden_states")
