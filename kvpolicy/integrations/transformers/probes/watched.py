"""The gradient of a loss by what every head of a model's attention says."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kvpolicy_kernels.key_centre import KeyCentre
from torch import Tensor, nn

from kvpolicy.budget.entry_format import named
from kvpolicy.cache.scoring import Scoring
from kvpolicy.errors import PluginError
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall
from kvpolicy.integrations.transformers.attention.observe import check_heads
from kvpolicy.integrations.transformers.attention.soft_attention import PositionBias, rounded
from kvpolicy.model.spec import ModelSpec
from kvpolicy.plugins.layer_gradients import LayerGradients

Visit = Callable[[LayerGradients], None]


class WatchedAttention:
    """One layer's own attention; the gradient of its output goes to `visit` as soon as the backward has it.

    ranks: by the positions of queries and keys;  first: the first query that a budget concerns
    is_exact: what a query sees as it came, of a format that leaves so many last tokens so
    key_centre: of its keys
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        layer: int,
        ranks: PositionBias,
        first: int,
        visit: Visit,
        is_exact: Callable[[Tensor, Tensor, int], Tensor],
        key_centre: KeyCentre | None,
    ) -> None:
        self.module, self.spec, self.layer, self.ranks = module, spec, layer, ranks
        self.first, self.visit, self.is_exact = first, visit, is_exact
        self.key_centre, self.calls = key_centre, 0

    def __call__(self, call: AttentionCall) -> Answer:
        check_heads(call, self.spec)
        self.calls += 1
        out, attention = call.stock()
        # in the first layer nothing else needs a gradient
        out = out + torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        query, key, value = (x[0].detach() for x in (call.query, call.key, call.value))
        scoring = call.scoring

        def hand_on(gradient: Tensor) -> None:
            def coded(begin: int, end: int, name: str) -> tuple[Tensor, Tensor]:
                own, rows, columns = named(name), *(torch.arange(x, end, device=key.device) for x in (begin, 0))
                if own is None:
                    raise PluginError("the model's dtype is no format that encodes: weights() has what there is")
                exact = self.is_exact(rows, columns, own.exact_recent)
                keys = [key[:, :end], rounded(key[:, :end], own, self.key_centre)]
                values = [value[:, :end], rounded(value[:, :end], own)]
                weights = attention_weights(query[:, begin:end], keys[0], begin, scoring, (keys[1], exact))
                gradients = gradient[0, begin:end].transpose(0, 1)
                gradients = gradients.reshape(key.shape[0], -1, *gradients.shape[1:]).float()
                parts = [(gradients @ x[:, None].float().mT).flatten(0, 1) for x in values]
                along: Tensor = weights * torch.where(exact, parts[0], parts[1])
                return weights, along

            with torch.no_grad():
                self.visit(
                    LayerGradients(
                        self.layer,
                        self.first,
                        gradient[0].transpose(0, 1),
                        value,
                        lambda begin, end: attention_weights(query[:, begin:end], key[:, :end], begin, scoring),
                        lambda begin, end: self.ranks(
                            self.layer, *(torch.arange(x, end, device=key.device) for x in (begin, 0))
                        ),
                        coded,
                    )
                )

        out.register_hook(hand_on)  # type: ignore[no-untyped-call]
        return out, attention


def attention_weights(
    query: Tensor, key: Tensor, begin: int, scoring: Scoring, coded: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Causal attention of the queries from position `begin` on, float32 [num_q_heads, n, columns].

    query: [num_q_heads, n, D];  key: [H, columns, D]
    coded: keys that are seen instead, and bool [n, columns], which are not
    """
    scale = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    grouped = query.reshape(key.shape[0], -1, *query.shape[1:])
    scores = (grouped @ key[:, None].transpose(-1, -2)).float().flatten(0, 1) * scale
    if coded is not None:
        others = (grouped @ coded[0][:, None].transpose(-1, -2)).float().flatten(0, 1) * scale
        scores = torch.where(coded[1], scores, others)
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(begin)
    scores = scores.masked_fill(~seen, -math.inf)
    if scoring.sink_logits is None:
        return scores.softmax(-1)
    sinks = scoring.sink_logits.detach().float()[:, None, None].expand(*scores.shape[:2], 1)
    weights: Tensor = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return weights
