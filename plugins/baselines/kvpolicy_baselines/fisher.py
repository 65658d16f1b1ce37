"""Fisher: what every capacity of every KV head costs, from one forward and one backward pass of each sequence.

No paper of its own. A small change d of what a head says moves the model's predictions by a divergence of half the
expected square of g . d, where g is the gradient of the log-probability of a token that the model itself draws (the
Fisher information; see Amari, Natural Gradient Works Efficiently in Learning, 1998). What a head says under a smaller
capacity follows from its attention without another forward, so one backward pass serves all capacities of all heads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import Importance, ImportanceEstimator, LayerGradients, ModelProbe, ModelSpec, PluginError

_QUERIES = 128  # at a time: the weights of all heads over all keys are held for so many
_ROUNDING = 1e-5
_EVERYTHING = 2**31  # more entries than there are
MODEL = "model"  # the name of no format: entries in the model's dtype
_FORWARDS = 4  # what a forward and a backward cost, whose layers are run once more


@dataclass(frozen=True, slots=True)
class FisherEstimator(ImportanceEstimator):
    """Curves of a KV head's part in the divergence from the full cache, in nats per scored token.

    sizes:  parts of the context that the curves have a point at, each in (0, 1)
    size:   one of them: importance is read off there
    seed:   of the tokens that the model draws
    others: part of the context in (0, 1], rounded up to one of sizes: what all other KV heads keep while the curve of
            one is taken. Of what two heads lose together each has half. At 1, or above all sizes, they keep everything
            as it is, and curves are of one head alone: KL(full || this head at c entries)

    To second order in the change of a head's output, and as if changes at different positions were independent. Where
    a head takes back what the others lose, its curve is 0. The curves end with 0 at the full context. Capacities are
    never below the probe's least one. Under a format the change is that of eviction and of the codes. Where the probe
    names several formats, there are also curves of one head alone in each, and what any two heads lose together by
    eviction, so that whoever chooses capacities can count what the others lose at those.
    """

    measures_formats: ClassVar[bool] = True

    sizes: tuple[float, ...] = (0.015625, 0.03125, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
    size: float = 0.125
    seed: int = 0
    others: float = 0.25

    def __post_init__(self) -> None:
        if not self.sizes or not all(0 < size < 1 for size in self.sizes) or self.size not in self.sizes:
            raise PluginError(
                "fisher: sizes must be parts of the context in (0, 1) and size one of them, got "
                f"{list(self.sizes)} and {self.size}"
            )
        if not 0 < self.others <= 1:
            raise PluginError(f"fisher: others must be a part of the context in (0, 1], got {self.others}")

    def estimate(self, probe: ModelProbe) -> Importance:
        context, least = probe.context_length, probe.least_capacity
        capacity = {size: min(max(round(size * context), least), context) for size in self.sizes}
        points = sorted({*capacity.values(), context})
        kept = torch.tensor(points) - probe.num_sink_tokens
        kept[-1] = _EVERYTHING
        shape, several = (*probe.spec.table_shape, len(points)), len(probe.formats) > 1
        curves = torch.zeros(shape, dtype=torch.float64)
        alone = torch.zeros(len(probe.formats), *shape, dtype=torch.float64)
        together = torch.zeros(*shape, *shape) if several else None
        count, beside = probe.num_sequences, bisect_left(points, round(self.others * context))
        probe.progress.begin("backward passes", count)
        try:
            for sequence in range(count):
                change = self._changes(probe, sequence, kept)
                curves += costs(change[0], beside)
                alone += change.square().sum(3, dtype=torch.float64)
                if together is not None:
                    together += products(change[0])
                probe.progress.advance(f"sequence {sequence + 1}/{count}")
        finally:
            probe.progress.end()
        tokens, place = 2 * probe.num_scored * count, points.index(capacity[self.size])
        found = (curves.clamp(min=0) / tokens).float()
        of_formats = dict(zip(probe.formats, (alone / tokens).float(), strict=True))
        if MODEL in of_formats:  # nothing at the full context, and not what rounding says
            of_formats[MODEL][..., -1] = 0
        if probe.formats[0] == MODEL:
            found[..., -1] = 0
        return Importance(
            found[..., place].clone(), None, found, torch.tensor(points), of_formats if several else None,
            None if together is None else together / tokens,
        )  # fmt: skip

    def _changes(self, probe: ModelProbe, sequence: int, kept: Tensor) -> Tensor:
        """float32 [F, L, H, n, K], see `changes`; layers that share entries change together."""
        layers: dict[int, Tensor] = {}

        def visit(part: LayerGradients) -> None:
            change = changes(part, kept, probe.formats).cpu()
            layers[part.layer] = change + layers.get(part.layer, 0.0)

        probe.observe_gradients(visit, sequence=sequence, seed=self.seed + sequence)
        return torch.stack([layers[layer] for layer in sorted(layers)], 1)

    def num_forwards(self, spec: ModelSpec, *, prompts: int, sequences: int) -> int:
        return _FORWARDS * sequences


def costs(change: Tensor, beside: int) -> Tensor:
    """float64 [L, H, K]: the sum over queries of d (d + e), e what the d of all other heads are together.

    change: [L, H, n, K], the changes d of the log-probability
    beside: index of the other heads' capacity; at the last one e is 0
    """
    own = change[..., beside]
    rest = own.sum((0, 1)) - own if beside < change.shape[-1] - 1 else torch.zeros_like(own)
    return (change * (change + rest[..., None])).sum(2, dtype=torch.float64)


def products(change: Tensor) -> Tensor:
    """[L, H, K, L, H, K]: the sum over queries of d d' of any two heads, 0 for a head with itself. change: as above"""
    layers, heads, _, points = change.shape
    rows = change.transpose(2, 3).flatten(0, 2)  # [L * H * K, n]
    both = (rows @ rows.mT).reshape(layers * heads, points, layers * heads, points)
    both.diagonal(dim1=0, dim2=2).zero_()
    return both.reshape(layers, heads, points, layers, heads, points)


def changes(part: LayerGradients, kept: Tensor, formats: Sequence[str] = (MODEL,)) -> Tensor:
    """float32 [F, num_kv_heads, n, K]: g . d of each of n queries, d the change of what a KV head's queries get.

    kept:    int64 [K], ascending, how many of the entries that may be evicted each of K capacities keeps
    formats: names of F formats that entries have
    """
    heads, length = part.values.shape[:2]
    edges = kept.to(part.values.device)
    total = part.values.new_zeros(len(formats), heads, length - part.first, len(kept), dtype=torch.float32)
    for begin in range(part.first, length, _QUERIES):
        end = min(begin + _QUERIES, length)
        weights = part.weights(begin, end).reshape(heads, -1, end - begin, end)  # [H, G, n, end]
        gradients = part.gradients[:, begin:end].reshape(heads, -1, end - begin, part.gradients.shape[2]).float()
        along = weights * (gradients @ part.values[:, None, :end].float().mT)  # an entry's part of g . output
        # place k: what capacity k keeps and the one below it does not; the last: what none keeps
        place = torch.bucketize(part.ranks(begin, end).contiguous(), edges, right=True)[:, None].expand_as(weights)
        before = along.sum(-1, keepdim=True)
        for index, name in enumerate(formats):
            if name != MODEL:
                weights, along = (x.reshape(heads, -1, *x.shape[1:]) for x in _coded(part, begin, end, name))
            change = _after(weights, along, place, len(kept)) - before
            # the query heads of a group change together
            total[index, :, begin - part.first : end - part.first] = change.sum(1)
    return total


def _coded(part: LayerGradients, begin: int, end: int, name: str) -> tuple[Tensor, Tensor]:
    if part.coded is None:
        raise PluginError(f"fisher: curves of the format {name} were asked for, and the probe knows nothing of formats")
    return part.coded(begin, end, name)


def _after(weights: Tensor, along: Tensor, place: Tensor, count: int) -> Tensor:
    """[..., K]: g . output over what each capacity keeps. along: an entry's part of it, [..., keys] as the others"""
    mass, output = (_sums(x, place, count) for x in (weights, along))
    sink = 1 - weights.sum(-1, keepdim=True)  # what a learned sink takes, or the rounding of a sum
    return output / (mass + sink.where(sink > _ROUNDING, 0.0)).clamp(min=torch.finfo(mass.dtype).tiny)


def _sums(x: Tensor, place: Tensor, count: int) -> Tensor:
    """[..., K], what each capacity keeps of x [..., keys]."""
    binned = x.new_zeros(*x.shape[:-1], count + 1).scatter_add_(-1, place, x)
    return binned[..., :-1].cumsum(-1)
