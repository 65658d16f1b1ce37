"""Which layers of a model may attend over the entries of earlier ones: KVSharer's calibration.

Source: KVSharer, arXiv:2410.18517; yangyifei729/KVSharer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.errors import BudgetError
from kvpolicy.integrations.transformers.attention.attention_call import Answer, AttentionCall, Handler
from kvpolicy.integrations.transformers.attention.attention_modules import attention_modules
from kvpolicy.integrations.transformers.attention.intercept import intercepted
from kvpolicy.integrations.transformers.model.logits import keep_logits
from kvpolicy.integrations.transformers.model.token_ids import check_token_ids
from kvpolicy.integrations.transformers.probes.exchanged_entries import exchanging
from kvpolicy.model.spec import ModelSpec
from kvpolicy.progress import Progress

THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class LayerSharing:
    """shared_layers: which layer takes whose entries, as in `ModelSpec.sharing`
    similarity: cosine of the model's last hidden states with and without it, as each of these layers was added
    tried:      pairs of layers that were tried
    """

    shared_layers: dict[int, int]
    similarity: tuple[float, ...]
    tried: int


@torch.no_grad()
def find_sharing(
    model: PreTrainedModel,
    texts: Tensor,
    count: int,
    *,
    most_similar: bool = False,
    progress: Progress | None = None,
) -> LayerSharing:
    """`count` layers whose entries may go, or as many as the rule finds.

    The distance of two layers is that of their keys and that of their values, averaged over the texts, as the mean over
    positions. Pairs come by falling distance (`most_similar`: by rising one), and one is taken where the cosine of the
    model's last hidden states with those of the whole model stays above 0.5.

    texts: int64 [n, length], each run once a pair that is tried

    Raises `BudgetError` for more layers than there are to share, `ModelError` for a model that cannot be probed.
    """
    spec = ModelSpec.from_config(model.config)
    pairs = [(i, j) for i in spec.budgeted_layers for j in spec.budgeted_layers if j < i not in spec.reused_layers]
    most = len({i for i, _ in pairs})
    if not 0 < count <= most:
        raise BudgetError(f"sharing is {count}, expected a number of layers from 1 to {most}")
    check_token_ids(model, texts, "texts")
    progress, entries = progress or Progress(), dict[int, tuple[Tensor, Tensor]]()
    whole = _last_hidden(model, texts, spec, {}, entries)
    distance = {(i, j): sum(map(_distance, entries[i], entries[j])) for i, j in pairs}
    shared: dict[int, int] = {}
    similarity: list[float] = []
    tried = 0
    progress.begin("layers that share", count)
    for i, j in sorted(distance, key=distance.__getitem__, reverse=not most_similar):
        if i in shared:
            continue
        tried += 1
        hidden = _last_hidden(model, texts, spec, shared | {i: j})
        cosine = float(F.cosine_similarity(hidden, whole, dim=-1).mean())
        if cosine > THRESHOLD:
            shared[i] = j
            similarity.append(cosine)
            progress.advance(f"layer {i} takes {j}'s entries, cosine {cosine:.3f}")
        if len(shared) == count:
            break
    progress.end()
    return LayerSharing(shared, tuple(similarity), tried)


def _last_hidden(
    model: PreTrainedModel,
    texts: Tensor,
    spec: ModelSpec,
    shared: Mapping[int, int],
    entries: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """float32 [n, length * hidden size] under a map. entries: takes each layer's keys and values, of all heads side by
    side and averaged over the texts, [length, H * dim]
    """
    handlers: dict[nn.Module, Handler] = {}
    if entries is not None:
        layers = spec.budgeted_layers
        modules = [module for module, _ in attention_modules(model, layers)]
        handlers = {module: _noting(entries, layer) for layer, module in zip(layers, modules, strict=True)}
    with intercepted(model, exchanging(model, spec.sharing(shared), shared, handlers)):
        ids = texts.to(model.device)
        out = model(ids, use_cache=False, output_hidden_states=True, **keep_logits(model))
    hidden: Tensor = out.hidden_states[-1]
    return hidden.float().flatten(1)


def _noting(entries: dict[int, tuple[Tensor, Tensor]], layer: int) -> Handler:
    def note(call: AttentionCall) -> Answer:
        entries[layer] = _mean(call.key), _mean(call.value)
        return call.stock()

    return note


def _mean(rows: Tensor) -> Tensor:
    """rows: [n, H, length, dim]"""
    return rows.float().mean(0).transpose(0, 1).flatten(1)


def _distance(one: Tensor, other: Tensor) -> float:
    """Mean over the positions. one, other: [length, H * dim]"""
    return float((one - other).norm(dim=-1).mean())
