"""What decoding costs on this machine, under a plan and under a stock cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpolicy.budget.entry_format import Format
from kvpolicy.defaults import CONTEXT, MIN_TOKENS, RETENTIONS
from kvpolicy.measure.machine import device_name
from kvpolicy.progress import Progress
from kvpolicy.verbs import arguments
from kvpolicy.verbs.cache_choice import CacheChoice, load_network

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.probes.decode_cost import DecodeCost
    from kvpolicy.text.corpus import Corpus


@dataclass(frozen=True, slots=True)
class Bench:
    """What was timed and weighed.

    run:    what was asked, and on what it ran
    dense:  the row of transformers' DynamicCache
    caches: one row for each retention, in the order asked for
    """

    run: dict[str, Any]
    dense: dict[str, Any]
    caches: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """What `kvpolicy bench --json` prints."""
        return {**self.run, "dense": self.dense, "caches": list(self.caches)}


def bench(
    plan: str | Path = "uniform",
    *,
    retention: float | Sequence[float] | None = None,
    context: int = CONTEXT,
    new_tokens: int = 32,
    repeats: int = 3,
    text: str | Path | None = None,
    policy: str | None = None,
    policy_param: Mapping[str, Any] | None = None,
    allocator: str | None = None,
    min_tokens: int = MIN_TOKENS,
    format: str | Format = None,
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Bench:
    """Times a prompt and decoding under a plan and under transformers' DynamicCache, and weighs both caches.

    plan:       a plan file, "uniform" or "full"
    retention:  kept fractions, each in (0, 1]; None for the plan's levels, or 0.5, 0.3, 0.1 under "uniform"
    context:    tokens of the prompt, which is fed at once
    new_tokens: tokens behind it, which are fed one by one; on a GPU the first two, which a recording takes, are not
        timed where there are more
    repeats:    of each cache; they take turns, and figures are medians
    text:       a UTF-8 file, repeated where it is too short; None for Python's language reference
    policy, policy_param: who evicts, and parameters over its own; None for the plan's, or streaming
    allocator:  splits the budget under "uniform"; None for an even split
    min_tokens: least entries of a KV head, on average
    format:     of the entries: "int8", "int4", "think", "model" for the model's dtype; None for the plan's own
    model:      a Hub id, a directory, a .gguf file; None for the plan's, which is not downloaded
    batch_size: sequences in one forward

    Raises `BudgetError`, `ModelError`, `PlanError`, `PluginError`, `TextError`.
    """
    choice = CacheChoice.of(str(plan), policy, policy_param, allocator, min_tokens, format)
    arguments.check_context(context)
    arguments.check_least(1, new_tokens=new_tokens, repeats=repeats, batch_size=batch_size)
    retentions = _retentions(choice, arguments.several(retention))
    source = arguments.optional_path(text)
    arguments.check_text(source)
    where = arguments.pick_device(device)

    name, network, tokenizer = load_network(
        model,
        choice.plan,
        progress or Progress(),
        revision=revision,
        device=where,
        dtype=arguments.pick_dtype(dtype, where),
    )
    from kvpolicy.integrations.transformers import read_corpus
    from kvpolicy.integrations.transformers.probes.decode_cost import measure_decode

    ids = _ids(read_corpus(tokenizer, source), batch_size, context + new_tokens)
    makers = {_label(choice.name, kept): partial(choice.make, network, kept) for kept in retentions}
    for make in makers.values():
        make()  # what is refused is refused before the work
    options: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "tokenizer": tokenizer}
    costs = measure_decode(network, ids, makers, **options, progress=progress)
    dense, *caches = [_row(cost, costs[0], kept) for cost, kept in zip(costs, [None, *retentions], strict=True)]
    run = {"model": name, "plan": choice.name, "policy": choice.policy_name, "context_length": context}
    run |= {"new_tokens": new_tokens, "repeats": repeats, "batch_size": batch_size, "device": device_name(where)}
    run |= {"dtype": str(network.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    return Bench(run | {"torch": torch.__version__}, dense, tuple(caches))


def _retentions(choice: CacheChoice, retentions: list[float]) -> list[float | None]:
    for kept in retentions:
        choice.check(kept)
    if retentions:
        return list(dict.fromkeys(retentions))
    if choice.name == "full":
        return [None]
    if choice.plan is None:
        return [*RETENTIONS]
    return [*reversed(choice.plan.retentions)]


def _ids(corpus: Corpus, count: int, length: int) -> torch.Tensor:
    """int64 [count, length] of the part that tune never searches, repeated where it is too short."""
    prefix = torch.tensor(corpus.prefix, dtype=torch.int64).expand(count, -1)
    body = length - len(corpus.prefix)
    rounds = -(-count * body // len(corpus.heldout))
    return torch.cat([prefix, corpus.heldout.repeat(rounds)[: count * body].view(count, body)], 1)


def _label(plan: str, retention: float | None) -> str:
    name = Path(plan).name
    return name if retention is None else f"{name} {retention:.4g}"


def _row(cost: DecodeCost, dense: DecodeCost, retention: float | None) -> dict[str, Any]:
    """The figures of one cache; ratios are to the stock one."""
    row = {
        "cache": cost.name,
        "ms_per_token": 1e3 * cost.median_token_seconds,
        "ms_per_token_of_each_repeat": [1e3 * seconds for seconds in cost.token_seconds],
        "token_ratio": cost.token_ratio(dense),
        "first_token_seconds": cost.median_first_token_seconds,
        "first_token_ratio": cost.first_token_ratio(dense),
        "peak_bytes": cost.peak_bytes,
        "bytes": cost.bytes,
        "bytes_ratio": cost.bytes / dense.bytes,
    }
    if cost is dense:
        return row
    kept = {"entries": cost.entries, "entries_seen": cost.entries_seen, "kept": cost.entries / cost.entries_seen}
    decoding = {"format": cost.entry_format, "decoding": cost.decoding, "why": cost.why}
    return {**row, "retention": retention, **kept, "evicted": cost.entries < cost.entries_seen, **decoding}
