r"""What formats of a cache cost a model, at equal bytes: int8 and int4, KIVI, ThinK and KVSharer, by simulation.

    python benchmarks/formats_study.py --text pg19.txt wiki.txt --out benchmarks/results/formats_cpu.csv

A prompt attends densely; then what a cache would hold of it is put in its place, encoded and decoded, with what is
evicted masked out, and the tokens behind it, which stay exact, are scored: perplexity, and the divergence from the full
cache, KL(full || row). Bytes are those of the prompt's entries over the same in 16 bits: codes, steps and zeros,
residuals and exact blocks, and 4 bytes of position an entry where some are evicted. At each level of bytes a format
keeps as many entries as fit; snapkv says which, under equal capacities and under those of each plan of --plan.

KIVI: keys per channel in groups of 32 tokens, values per token in groups of 32 channels, the last `T mod 128` keys and
the last 128 values exact, as at the end of a prompt. ThinK: 0.6 of the key channels, by the last 32 queries, the last
32 keys whole, after the eviction. KVSharer: a layer takes another one's keys and values, in the prompt too; the map is
calibrated on 30 pieces of 64 tokens of the first text's end by the published rule, and by its reverse.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from kvpolicy_baselines.snapkv import SnapKVPolicy
from kvpolicy_kernels.formats import INT4, INT8, EntryFormat
from shared import command_line, machine, timed, write_csv
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import kvpolicy
from kvpolicy import Budget, LayerActivations, ModelSpec, apportion
from kvpolicy.integrations.transformers.model.versions import with_cache
from kvpolicy.measure.stats import mean_interval

WINDOW, SINKS, POSITION = 32, 4, 4
KIVI_GROUP, KIVI_RESIDUAL = 32, 128
THINK = 0.6
PIECES, PIECE, SHARED = 30, 64, 4  # KVSharer's calibration, and the most layers that share
Map = dict[int, int]
Rows = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Queries of the window [w, G, D], kept keys [e, D] and values [e, D] of a KV head -> keys and values as given back."""


@dataclass(frozen=True)
class Way:
    """How entries are kept. nbytes: of so many entries of a KV head, without positions."""

    name: str
    nbytes: Callable[[int], float]
    rows: Rows


def ways(dim: int) -> list[Way]:
    plain = 2 * dim
    think = plain - 2 * int(dim * (1 - THINK))
    return [
        Way("16 bits", lambda e: 2 * plain * e, lambda q, k, v: (k, v)),
        Way("int8", lambda e: 2 * INT8.row_bytes(dim) * e, lambda q, k, v: (coded(INT8, k), coded(INT8, v))),
        Way("int4", lambda e: 2 * (plain * min(e, SINKS + WINDOW) + INT4.row_bytes(dim) * max(0, e - SINKS - WINDOW)),
            lambda q, k, v: (between(INT4, k), between(INT4, v))),
        Way("kivi4", lambda e: kivi_bytes(e, dim, 4), lambda q, k, v: kivi(k, v, 4)),
        Way("kivi2", lambda e: kivi_bytes(e, dim, 2), lambda q, k, v: kivi(k, v, 2)),
        Way("think", lambda e: plain * e + plain * min(e, WINDOW) + think * max(0, e - WINDOW) + dim / 8,
            lambda q, k, v: (thinned(q, k), v)),
    ]  # fmt: skip


def coded(entry_format: EntryFormat, rows: Tensor) -> Tensor:
    return entry_format.decode(entry_format.encode(rows), rows.dtype)


def between(entry_format: EntryFormat, rows: Tensor) -> Tensor:
    """All but the sink tokens and the last tokens, which lie in the exact block."""
    out = rows.clone()
    out[SINKS:-WINDOW] = coded(entry_format, rows[SINKS:-WINDOW])
    return out


def kivi_bytes(entries: int, dim: int, bits: int) -> float:
    row = dim * bits / 8
    whole = entries - entries % KIVI_RESIDUAL
    keys = whole * row + whole // KIVI_GROUP * dim * 4 + (entries - whole) * dim * 2
    past = max(0, entries - KIVI_RESIDUAL)
    return keys + past * (row + dim // KIVI_GROUP * 4) + (entries - past) * dim * 2


def kivi(keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    keys, values = keys.clone(), values.clone()
    whole, past = len(keys) - len(keys) % KIVI_RESIDUAL, max(0, len(keys) - KIVI_RESIDUAL)
    if whole:
        keys[:whole] = stepped(keys[:whole].unflatten(0, (-1, KIVI_GROUP)), 1, bits).flatten(0, 1)
    if past:
        values[:past] = stepped(values[:past].unflatten(1, (-1, KIVI_GROUP)), 2, bits).flatten(1, 2)
    return keys, values


def stepped(x: Tensor, dim: int, bits: int) -> Tensor:
    """KIVI's asymmetric steps, which it keeps in the model's 16 bits."""
    low = x.amin(dim, keepdim=True).bfloat16().float()
    step = ((x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1)).bfloat16().float().clamp(min=1e-9)
    return ((x - low) / step).clamp(0, 2**bits - 1).round() * step + low


def thinned(queries: Tensor, keys: Tensor) -> Tensor:
    """queries: [w, G, D]. The lowest channels of all but the last keys are zero."""
    score = queries.square().mean((0, 1)) * keys.square().mean(0)
    out, lowest = keys.clone(), score.argsort()[: int(keys.shape[1] * (1 - THINK))]
    out[: max(0, len(keys) - WINDOW), lowest] = 0.0
    return out


class Study:
    """A model whose attention is ours: causal, with masks, with layers that share, and with what snapkv asks for."""

    def __init__(self, model_name: str, prompt: int) -> None:
        self.model, self.tokenizer = kvpolicy.load_model(model_name, dtype="float32")
        self.spec, self.prompt = ModelSpec.from_config(self.model.config), prompt
        self.keep: list[Tensor] | None = None  # bool [H, prompt] of each layer, behind a prompt
        self.shared: Map = {}
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # queries, keys and values of the last forward
        AttentionInterface.register("formats_study", self.attend)
        AttentionMaskInterface.register("formats_study", sdpa_mask)
        self.model.set_attn_implementation("formats_study")

    def attend(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object,
               scaling: float | None = None, **_: object) -> tuple[Tensor, None]:  # fmt: skip
        layer = module.layer_idx
        if layer in self.shared:
            key, value = self.seen[self.shared[layer]][1:]
        self.seen[layer] = query, key, value
        n, total = query.shape[2], key.shape[2]
        visible = torch.ones(n, total, dtype=torch.bool).tril(total - n)[None]
        if self.keep is not None:
            visible = visible.repeat(key.shape[1], 1, 1)
            visible[:, :, : self.prompt] &= self.keep[layer][:, None]
        visible = visible.repeat_interleave(query.shape[1] // len(visible), 0) if len(visible) > 1 else visible
        out = F.scaled_dot_product_attention(query, key, value, visible, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    def forward(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        with torch.no_grad():
            return self.model(ids[None], **with_cache(self.model, cache), use_cache=True).logits[0]

    def prompted(self, ids: Tensor, shared: Map) -> tuple[DynamicCache, list[Tensor], list[Tensor]]:
        """The cache of a prompt, and of each layer the last queries [w, H, G, D] and snapkv's scores [H, n]."""
        self.keep, self.shared, cache = None, shared, DynamicCache()
        self.forward(ids[: self.prompt], cache)
        queries, scores, policy = [], [], SnapKVPolicy(num_sink_tokens=SINKS)
        positions = torch.arange(self.prompt).expand(1, self.spec.num_kv_heads, -1)
        hidden = torch.ones(WINDOW, self.prompt, dtype=torch.bool).triu(self.prompt - WINDOW + 1)
        for layer in range(len(self.spec.layers)):
            query, key, _ = self.seen[layer]
            q = query[0, :, -WINDOW:].unflatten(0, (key.shape[1], -1))  # [H, G, w, D]
            weights = (q @ key[0].transpose(1, 2)[:, None] * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
            activations = LayerActivations(layer, window_attention=weights.softmax(-1).sum((1, 2))[None],
                                           positions=positions)  # fmt: skip
            rank = policy.score_prompt(activations)[0]
            rank[:, -WINDOW:] = rank[:, :SINKS] = math.inf
            queries.append(q.permute(2, 0, 1, 3))
            scores.append(rank)
        return cache, queries, scores


def capacities(way: Way, shares: Tensor, level: float, prompt: int, dim: int) -> Tensor:
    """A table that takes at most `level` of the prompt's bytes in 16 bits, by bisection of its total.

    It is the largest one, but for KIVI, whose exact keys come and go with every 128 entries.
    """
    allowed, floor = level * shares.numel() * prompt * 4 * dim, SINKS + WINDOW + 1
    low, high = floor * shares.numel(), prompt * shares.numel()

    def table(total: int) -> Tensor:
        return apportion(shares, Budget(total, tuple(shares.shape), floor, prompt))

    while high - low > 1:
        middle = (low + high) // 2
        if weight(way, table(middle)) <= allowed:
            low = middle
        else:
            high = middle
    return table(low)


def weight(way: Way, table: Tensor) -> float:
    return sum(way.nbytes(e) + POSITION * e for e in table.flatten().tolist())


def measured(study: Study, sequences: Tensor, tables: dict[tuple[str, str, float], tuple[Way, Tensor]],
             maps: dict[str, Map]) -> Iterator[tuple[str, str, float, float, float]]:  # fmt: skip
    """(row, allocation, bytes, loss, divergence) of each sequence; the full cache first."""
    prompt, spec = study.prompt, study.spec
    for number, ids in enumerate(sequences):
        cache, queries, scores = study.prompted(ids, {})
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        full = study.forward(ids[prompt:-1], rebuilt(kept)).log_softmax(-1)
        yield "full", "", 1.0, *judged(full, full, ids[prompt + 1 :])
        for (name, allocation, nbytes), (way, table) in tables.items():
            rows, study.keep = [], []
            for layer, (keys, values) in enumerate(kept):
                keys, values = keys.clone(), values.clone()
                keep = torch.zeros(spec.num_kv_heads, prompt, dtype=torch.bool)
                for h in range(spec.num_kv_heads):
                    best = scores[layer][h].topk(int(table[layer, h])).indices.sort().values
                    keep[h, best] = True
                    keys[0, h, best], values[0, h, best] = way.rows(
                        queries[layer][:, h], keys[0, h, best], values[0, h, best]
                    )
                rows.append((keys, values))
                study.keep.append(keep)
            logits = study.forward(ids[prompt:-1], rebuilt(rows)).log_softmax(-1)
            yield name, allocation, nbytes, *judged(full, logits, ids[prompt + 1 :])
        for name, shared in maps.items():
            cache = study.prompted(ids, shared)[0]
            logits = study.forward(ids[prompt:-1], cache).log_softmax(-1)
            yield name, "", 1 - len(shared) / len(spec.layers), *judged(full, logits, ids[prompt + 1 :])
        print(f"sequence {number + 1} of {len(sequences)}", flush=True)


def rebuilt(rows: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(rows):
        cache.update(keys.clone(), values.clone(), layer)
    return cache


def judged(full: Tensor, logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean loss, and mean KL(full || row). full, logits: log-probabilities [n, vocabulary]."""
    return float(F.nll_loss(logits, targets)), float((full.exp() * (full - logits)).sum(-1).mean())


def calibrated(study: Study, pieces: Tensor, most: int, similar: bool) -> Map:
    """KVSharer's map: pairs by falling distance of their caches, or by rising one, taken while the model agrees."""
    study.keep, study.shared = None, {}
    hidden = last_hidden(study, pieces)
    caches = [
        torch.stack([x.mean(0).transpose(0, 1).flatten(1) for x in study.seen[i][1:]])
        for i in range(len(study.spec.layers))
    ]
    pairs = [(i, j) for i in range(len(caches)) for j in range(i)]
    distance = {(i, j): float((caches[i] - caches[j]).norm(dim=-1).mean()) for i, j in pairs}
    found: Map = {}
    for i, j in sorted(pairs, key=lambda pair: distance[pair], reverse=not similar):
        if i in found:
            continue
        study.shared = found | {i: j}
        if float(F.cosine_similarity(last_hidden(study, pieces), hidden, dim=-1).mean()) > 0.5:
            found[i] = j
        if len(found) == most:
            break
    study.shared = {}
    return found


def last_hidden(study: Study, pieces: Tensor) -> Tensor:
    """[pieces, tokens * hidden size]."""
    with torch.no_grad():
        return study.model.model(pieces, use_cache=False).last_hidden_state.flatten(1)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="whose capacities are used besides equal ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--behind", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="of each text")
    parser.add_argument("--bytes", type=float, nargs="+", default=[0.3, 0.15, 0.075], dest="levels")
    parser.add_argument("--maps", type=int, nargs="*", default=[1, SHARED], help="numbers of layers that share")
    options = parser.parse_args()
    study = Study(options.model, options.prompt)
    seconds, lines = timed(lambda: report(study, options))
    write_csv(options.out, [line | {"seconds_of_all": round(seconds), **machine("cpu", "torch", "transformers")}
                            for line in lines])  # fmt: skip


def report(study: Study, options: argparse.Namespace) -> list[dict[str, object]]:
    corpora = [kvpolicy.read_corpus(study.tokenizer, path) for path in options.text]
    length, prompt = options.prompt + options.behind, options.prompt
    sequences = torch.cat([corpus.sequences("whole", options.sequences, length) for corpus in corpora])
    pieces = corpora[0].whole[-PIECES * PIECE :].view(PIECES, PIECE)
    maps = {f"share {n}, {'most similar' if similar else 'as published'}": calibrated(study, pieces, n, similar)
            for similar in (False, True) for n in options.maps}  # fmt: skip
    print(maps, flush=True)
    dim = study.spec.head_dim
    tables: dict[tuple[str, str, float], tuple[Way, Tensor]] = {}
    whole = torch.full(study.spec.table_shape, prompt)
    size = whole.numel() * prompt * 4 * dim
    for way in ways(dim)[1:]:
        tables[way.name, "nothing evicted", way.nbytes(prompt) * whole.numel() / size] = way, whole
    shares = {"equal": lambda _: torch.ones(study.spec.table_shape)}
    for path in options.plan:
        plan = kvpolicy.load_plan(path)
        shares[path.stem] = lambda level, plan=plan: plan.capacities(context_length=prompt, retention=level).double()
    for level in options.levels:
        for allocation, of in shares.items():
            for way in ways(dim):
                entries = min(level * 4 * dim / (way.nbytes(prompt) / prompt + POSITION), 1.0)
                table = capacities(way, of(entries), level, prompt, dim)
                tables[way.name, allocation, weight(way, table) / size] = way, table
    found: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for name, allocation, nbytes, loss, divergence in measured(study, sequences, tables, maps):
        found.setdefault((name, allocation, nbytes), []).append((loss, divergence))
    base = torch.tensor(found["full", "", 1.0])[:, 0].mean()
    lines: list[dict[str, object]] = []
    for (name, allocation, nbytes), pairs in found.items():
        losses, divergences = torch.tensor(pairs, dtype=torch.float64).T
        low, high = mean_interval(divergences)
        lines.append(
            {"row": name, "capacities": allocation, "bytes": round(nbytes, 4),
             "perplexity": round(float(losses.mean().exp()), 3),
             "increase_percent": round(100 * float(torch.expm1(losses.mean() - base)), 2),
             "kl": round(float(divergences.mean()), 5), "kl_low": round(low, 5), "kl_high": round(high, 5),
             "n": len(pairs), "prompt": prompt, "scored": options.behind - 1, "model": options.model,
             "texts": " ".join(path.stem for path in options.text)}
        )  # fmt: skip
        print(*list(lines[-1].values())[:8], sep="\t", flush=True)
    return lines


if __name__ == "__main__":
    main()
