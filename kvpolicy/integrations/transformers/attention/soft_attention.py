"""A model under a bias on its attention scores, so that gradients reach the bias and memory stays small.

Each decoder layer is checkpointed, and within it each block of queries, if there are several: of a layer there is what
enters it, and one block's scores at a time. What is checkpointed is computed again in the backward, long after the
forward has ended, so each layer brings the conditions of the forward back for that time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from kvpolicy_kernels.formats import EntryFormat
from kvpolicy_kernels.formats import rounded as rounded_rows
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kvpolicy.cache.scoring import Scoring
from kvpolicy.errors import PluginError
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall, Handler, as_answer
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.integrations.transformers.attention.observe import check_heads
from kvpolicy.model.spec import ModelSpec

_SCORES = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Of a block of queries, all heads: 134 MB in fp32. A GPU would wait for Python at that size."""
_DIFFERENTIABLE = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""torch's kernels that give a mask its gradient."""

IsExact = Callable[[Tensor, Tensor], Tensor]
"""Positions of queries `[q]` and of keys `[k]` on one device -> bool `[q, k]`, whether a key is seen as it came."""

PositionBias = Callable[[int, Tensor, Tensor], Tensor]
"""Budgeted layer, positions of queries `[q]` and of keys `[k]` on one device -> `[H, q, k]`."""
Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]


class BiasedAttention:
    """Causal attention with a bias on the scores, in place of one layer's attention.

    prefill_length: queries at the start that attend densely, through the model's own attention
    entry_format:   of the entries; None leaves keys and values as they are. Gradients pass by the rounding
    is_exact:       what a query sees as it came under a format
    key_centre:     of its keys
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        layer: int,
        bias: PositionBias,
        prefill_length: int,
        entry_format: EntryFormat | None = None,
        is_exact: IsExact | None = None,
        key_centre: KeyCentre | None = None,
    ) -> None:
        self.module, self.spec, self.layer, self.bias = module, spec, layer, bias
        self.prefill_length, self.entry_format, self.is_exact = prefill_length, entry_format, is_exact
        self.key_centre, self.calls = key_centre, 0

    def __call__(self, call: AttentionCall) -> Answer:
        check_heads(call, self.spec)
        self.calls += 1
        query, entries = call.query, [call.key, call.value]
        if self.entry_format is not None:
            entries += [rounded(call.key, self.entry_format, self.key_centre), rounded(call.value, self.entry_format)]
        # of the call the scoring alone: a block lives until its backward, and would keep all that a call holds
        first, block = min(self.prefill_length, query.shape[2]), partial(self._block, scoring=call.scoring)
        out = [call.stock()[0][:, :first].transpose(1, 2)] if first else []
        most_rows = _SCORES.get(query.device.type, _SCORES["cpu"]) // (query.shape[0] * query.shape[1] * query.shape[2])
        most_rows = max(most_rows - most_rows % 8, 8)  # masks whose rows are aligned
        rows = torch.split(query[:, :, first:], most_rows, dim=2)
        if len(rows) > 1:  # otherwise the layer's checkpoint is enough
            block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        begins = range(first, query.shape[2], most_rows)
        out += [block(begin, part, *entries) for begin, part in zip(begins, rows, strict=True)]
        return as_answer(torch.cat(out, dim=2))

    def _block(self, begin: int, query: Tensor, key: Tensor, value: Tensor, *coded: Tensor, scoring: Scoring) -> Tensor:
        """Queries from position `begin` on: [B, num_q_heads, n, value_dim]. coded: key and value as codes say them"""
        batch, num_q_heads, count, dim = query.shape
        num_kv_heads, end = key.shape[1], begin + count
        key, value, bias = self._seen(begin, end, (key, value), coded)
        scale, softcap, sinks = scoring.scale or dim**-0.5, scoring.softcap, scoring.sink_logits
        # the heads that share keys become sequences of their own, [B * group, H, n, D], under one bias
        query = query.reshape(batch, num_kv_heads, -1, count, dim).transpose(1, 2)
        group = query.shape[1]
        query = query.flatten(0, 1)
        key, value = (x[:, None].expand(-1, group, -1, -1, -1).flatten(0, 1) for x in (key, value))
        if softcap or sinks is not None:
            columns = None if sinks is None else sinks.detach().reshape(num_kv_heads, group).T.repeat(batch, 1)
            mixed = _attention(query, key, value, bias, scale, softcap, columns)
        else:
            if bias.requires_grad and not query.requires_grad:
                query = query.detach().requires_grad_()  # in the first layer: torch's kernel looks here, not at masks
            with sdpa_kernel(_DIFFERENTIABLE):
                mask = bias.to(query.dtype).expand(len(query), -1, -1, -1)
                mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        mixed = mixed.reshape(batch, group, num_kv_heads, count, -1)
        return mixed.transpose(1, 2).reshape(batch, num_q_heads, count, -1)

    def _seen(
        self, begin: int, end: int, exact: Sequence[Tensor], coded: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values that the queries see, [B, H, n, D], and the bias of each."""
        key, value = (x[:, :, :end] for x in exact)
        bias = self._bias(begin, end, key.device)
        if not coded or self.is_exact is None:
            return key, value, bias
        rows, columns = torch.arange(begin, end, device=key.device), torch.arange(end, device=key.device)
        as_it_came = self.is_exact(rows, columns)
        used = (as_it_came & (columns <= rows[:, None])).any(0).nonzero()[:, 0]
        parts = [bias.masked_fill(as_it_came, -math.inf), bias[..., used].masked_fill(~as_it_came[:, used], -math.inf)]
        key, value = (torch.cat([y[:, :, :end], x[:, :, used]], 2) for x, y in zip(exact, coded, strict=True))
        return key, value, torch.cat(parts, -1)

    def _bias(self, begin: int, end: int, device: torch.device) -> Tensor:
        """[H, n, end] with causality."""
        rows = torch.arange(begin, end, device=device)
        columns = torch.arange(end, device=device)
        bias = self.bias(self.layer, rows, columns)
        if tuple(bias.shape) != (self.spec.num_kv_heads, end - begin, end):
            raise PluginError(
                f"soft_loss: the bias of layer {self.layer} has shape {list(bias.shape)}, expected [KV heads, "
                f"queries, keys] = {[self.spec.num_kv_heads, end - begin, end]}"
            )
        return bias.masked_fill(columns > rows[:, None], float("-inf"))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """What torch's kernels cannot do: a softcap, and a learned logit for each head, `sinks` [B, H], of value zero.

    query: [B, H, q, D];  key, value: [B, H, k, D];  bias: [H, q, k]
    """
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[..., None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].to(value.dtype)
    return weights @ value


def rounded(rows: Tensor, entry_format: EntryFormat, centre: KeyCentre | None = None) -> Tensor:
    """Rows as their codes say them; the gradient is that of the rows.

    rows: [..., H, n, D], of the first n positions;  centre: of keys
    """
    with torch.no_grad():
        error = rounded_rows(rows, entry_format, None if centre is None else centre.along(rows.shape[-2])) - rows
    return rows + error


class OfModule(Protocol):
    """A handler that knows whose attention it answers for."""

    module: nn.Module

    def __call__(self, call: AttentionCall) -> Answer: ...


@contextmanager
def biased(model: PreTrainedModel, handlers: Sequence[OfModule], blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context the handlers answer, the model is checkpointed layer by layer, and its parameters are frozen.

    blocks: the decoder layers. Gradients may be taken after the context has ended; the model is left as it was.
    """
    by_module: dict[nn.Module, Handler] = {handler.module: handler for handler in handlers}

    @contextmanager
    def conditions() -> Iterator[None]:
        with frozen(model), intercepted(model, by_module):
            yield

    with ExitStack() as stack:
        stack.enter_context(conditions())
        for block in blocks:
            stack.enter_context(_checkpointed(block, lambda: (nullcontext(), conditions())))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(block: nn.Module, contexts: Contexts) -> Iterator[None]:
    """The forward of one decoder layer keeps what enters it alone."""
    forward, own = block.forward, "forward" in vars(block)

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    block.forward = again
    try:
        yield
    finally:
        if own:  # another library's, such as accelerate's
            block.forward = forward
        else:
            del block.forward
