"""Calling an eviction policy: what it is given, and what is checked of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from kvpolicy_kernels.column_scores import Reduction, column_scores
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.cache.arena import Chunk, LayerArena
from kvpolicy.errors import PluginError
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import DecodeStep, EvictionPolicy, LayerActivations

STORE_SOURCES = frozenset(
    {
        "positions",
        "scores",
        "keys",
        "values",
        "queries",
        "scale",
        "query_attention",
        "window_attention",
        "full_attention",
        "decode_attention",
    }
)
"""What a store can hand to a policy by itself."""

_AFTER_REPEAT = frozenset({"positions", "keys", "values", "decode_attention", "module", "output_weight", "rotary"})


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns scores into attention: what the op needs besides queries, keys and values."""

    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "sink_logits": self.sink_logits}


def check_sources(policy: EvictionPolicy, supplied: frozenset[str]) -> None:
    """Raises `PluginError` where a policy requires what it cannot be given. supplied: besides `STORE_SOURCES`."""
    name, missing = type(policy).__name__, plugin_call.admitted(policy).requires - STORE_SOURCES - supplied
    if missing:
        raise PluginError(
            f"the policy {name} requires {', '.join(sorted(missing))}, which this cache cannot "
            f"supply; it supplies {', '.join(sorted(STORE_SOURCES | supplied))}"
        )
    gone = policy.requires - _AFTER_REPEAT - {"repeat_attention"}
    if "repeat_attention" in policy.requires and gone:
        raise PluginError(
            f"the policy {name} requires repeat_attention and {', '.join(sorted(gone))}: once the context has been "
            f"repeated, only {', '.join(sorted(_AFTER_REPEAT))} are left of its own forward"
        )


def score_chunk(
    policy: EvictionPolicy,
    layer: int,
    arena: LayerArena,
    query: Tensor,
    chunk: Chunk,
    options: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Tensor:
    """The policy's scores of [entries held ; chunk], float32 [S, width + n].

    query:   [B, num_q_heads, n, D] of the chunk's last n tokens
    options: scale, softcap, sink_logits;  extra: what the policy requires besides `STORE_SOURCES`

    Raises `PluginError` for a source that is missing in `extra`, and for scores of another shape.
    """
    missing = policy.requires - STORE_SOURCES - extra.keys()
    if missing == {"repeat_attention"} and arena.width:
        return _unasked(policy, arena, chunk)
    if missing:
        raise PluginError(
            f"{type(policy).__name__} requires {', '.join(sorted(missing))}: give it as extra= with the prompt"
        )
    options = {**options, "power": policy.attention_power}
    given = {name: plugin_call.lent(extra[name]) for name in policy.requires & extra.keys()}
    rows = arena.padded_rows()
    if "positions" in policy.requires:
        given["positions"] = _positions(arena, chunk)
    if "scores" in policy.requires:
        given["scores"] = _scores(arena, rows, chunk)
    if "keys" in policy.requires:
        given["keys"] = _with_chunk(arena.keys, rows, chunk.key)
    if "values" in policy.requires:
        given["values"] = _with_chunk(arena.values, rows, chunk.value)
    if "queries" in policy.requires:
        given["queries"] = plugin_call.lent(query)
    if "scale" in policy.requires:
        scale = options.get("scale")
        given["scale"] = query.shape[-1] ** -0.5 if scale is None else scale
    if "query_attention" in policy.requires:
        last = query[:, :, -policy.observation_window :]
        given["query_attention"] = attention_of_each(arena, last, chunk, options)
    if "window_attention" in policy.requires:
        last = query[:, :, -policy.observation_window :]
        given["window_attention"] = attention_mass(arena, last, chunk, options)
    if "full_attention" in policy.requires:
        given["full_attention"] = attention_mass(arena, query, chunk, options)
    shape = (*chunk.key.shape[:2], rows.shape[1] + len(chunk))
    scores = plugin_call.prompt_scores(policy, LayerActivations(layer=layer, **given), shape, arena.device)
    return scores.flatten(0, 1)


def score_step(
    policy: EvictionPolicy,
    layer: int,
    arena: LayerArena,
    query: Tensor,
    options: Mapping[str, Any],
    wrong: NotANumber,
) -> None:
    """Lets the policy rescore the entries after a decoding step, if it does that at all. query: [B, num_q_heads, 1, D].

    wrong: is given the scores, to be checked once for all layers

    Raises `PluginError` for scores of another type, shape or device.
    """
    if arena.scores is None or type(policy).score_step is EvictionPolicy.score_step:
        return
    segment, column = (torch.arange(arena.width)[None] < arena.length[:, None]).nonzero(as_tuple=True)
    rows = (arena.start[segment] + column).to(arena.device)
    given = {}
    if "keys" in policy.requires:
        given["keys"] = arena.keys[rows]
    if "decode_attention" in policy.requires:
        mass = column_scores(query, arena.keys, arena.start, arena.length, power=policy.attention_power, **options)
        given["attention"] = mass.flatten(0, 1)[segment.to(arena.device), column.to(arena.device)]
    step = DecodeStep(
        layer=layer,
        num_kv_heads=len(arena.start) // query.shape[0],
        scores=arena.scores[rows],
        positions=arena.positions[rows],
        indptr=torch.cat([arena.length.new_zeros(1), arena.length.cumsum(0)]).to(arena.device, torch.int32),
        **given,
    )
    scores = plugin_call.step_scores(policy, step)
    wrong.add(scores)
    arena.scores[rows] = scores


def attention_mass(
    arena: LayerArena, query: Tensor, chunk: Chunk, options: Mapping[str, Any], reduction: Reduction = "sum"
) -> Tensor:
    """Attention that [entries held ; chunk] get from these queries: the sum, or the largest, over queries and group.

    query: [B, num_q_heads, n, D] of the chunk's last n tokens. Returns float32 [B, H, width + len(chunk)].
    """
    num_queries = query.shape[2]
    mask = query_mask = None
    if bool((chunk.positions < 0).any()):
        mask = chunk_mask(chunk, num_queries)
        query_mask = (chunk.positions[:, -num_queries:] >= 0).to(query.device)
    return column_scores(
        query,
        arena.keys,
        arena.start,
        arena.length,
        chunk_key=chunk.key,
        chunk_mask=mask,
        query_mask=query_mask,
        reduction=reduction,
        **options,
    )


def attention_of_each(arena: LayerArena, query: Tensor, chunk: Chunk, options: Mapping[str, Any]) -> Tensor:
    """`attention_mass` of one query after the other, float32 [B, H, n, width + len(chunk)]."""
    num_queries, rows = query.shape[2], []
    for index in range(num_queries):
        later = num_queries - 1 - index  # tokens of the chunk that this query does not see
        seen = chunk.part(slice(0, len(chunk) - later))
        rows.append(pad(attention_mass(arena, query[:, :, index : index + 1], seen, options), (0, later)))
    return torch.stack(rows, 2)


def chunk_mask(chunk: Chunk, num_queries: int) -> Tensor:
    """What the chunk's last n tokens see of it: causal, padding excluded. Returns bool [B, 1, n, m]."""
    length = len(chunk)
    query = torch.arange(length - num_queries, length)[:, None]
    causal = torch.arange(length)[None] <= query
    return (causal[None] & (chunk.positions >= 0)[:, None]).unsqueeze(1).to(chunk.key.device)


def _unasked(policy: EvictionPolicy, arena: LayerArena, chunk: Chunk) -> Tensor:
    """Scores of entries and of tokens behind a context that was repeated: theirs, and a decoded token's."""
    held = arena.padded_scores()
    assert held is not None  # nobody else is scored
    return torch.cat([held, held.new_full((len(held), len(chunk)), policy.new_entry_score)], 1)


def _positions(arena: LayerArena, chunk: Chunk) -> Tensor:
    batch, heads = chunk.key.shape[:2]
    return torch.cat([arena.padded_positions().view(batch, heads, -1), chunk.positions_on(arena.device)], 2)


def _scores(arena: LayerArena, rows: Tensor, chunk: Chunk) -> Tensor:
    assert arena.scores is not None  # the store asks only where entries are scored
    fresh = torch.zeros(*chunk.key.shape[:3], 1, device=arena.device)
    return _with_chunk(arena.scores[:, None], rows, fresh)[..., 0]


def _with_chunk(entries: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    """A copy, [B, H, width + n, dim]; zeros where an entry is absent."""
    if not rows.shape[1]:
        return fresh.detach().clone()
    held = entries[rows.clamp(min=0)].masked_fill((rows < 0)[..., None], 0)
    return torch.cat([held.view(*fresh.shape[:2], *held.shape[1:]), fresh], 2)


@dataclass(slots=True)
class NotANumber:
    """Whether a policy has returned NaN: gathered on the device, and asked for once, since asking waits for it.

    found: bool [], since the last check; None where nothing has come
    """

    found: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        found = scores.isnan().any()
        self.found = found if self.found is None else found | self.found.to(found.device)

    def check(self, policy: EvictionPolicy, method: str) -> None:
        """Raises `PluginError` where any of the scores since the last check was none."""
        found, self.found = self.found, None
        if found is not None and bool(found):
            plugin_call.refuse_nan(policy, method)
