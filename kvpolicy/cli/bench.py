"""`kvpolicy bench`: what decoding costs on this machine, under a plan and under a stock cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvpolicy.cli import cache_options
from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.defaults import MIN_TOKENS, RETENTIONS
from kvpolicy.measure.machine import device_name


def bench(
    plan: cache_options.PlanName = "uniform",
    retention: Annotated[list[float] | None, opt.retentions("the plan's levels; 0.5, 0.3, 0.1 for uniform")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = opt.DEFAULT_CONTEXT,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Of each cache; they take turns.")] = 3,
    text: opt.Text = None,
    policy: cache_options.Policy = None,
    policy_param: opt.PolicyParams = None,
    allocator: cache_options.Allocator = None,
    min_tokens: cache_options.MinTokens = MIN_TOKENS,
    model: Annotated[
        str | None, typer.Option(help="As for tune; default: the plan's model.", rich_help_panel="Model")
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    batch_size: opt.BatchSize = 1,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Time a prompt and decoding under a plan and under transformers' DynamicCache, and weigh both caches.

    Every cache is fed the same text: --context tokens at once, then --new-tokens one by one. The caches take turns, so
    that a drift of the machine hits all of them; figures are medians over the repeats. A text that is too short is
    repeated.
    """
    choice = cache_options.CacheChoice.of(plan, policy, policy_param, allocator, min_tokens)
    opt.check_context(context)
    retentions = _retentions(choice, retention)
    opt.check_text(text)
    where = opt.pick_device(device)

    from kvpolicy.integrations.transformers import read_corpus
    from kvpolicy.integrations.transformers.probes.decode_cost import measure_decode

    name, network, tokenizer = cache_options.load_network(
        model, choice.plan, revision=revision, device=where, dtype=opt.pick_dtype(dtype, where)
    )
    ids = _ids(read_corpus(tokenizer, text), batch_size, context + new_tokens)
    makers = {_label(plan, kept): partial(choice.make, network, kept) for kept in retentions}
    for make in makers.values():
        make()  # what is refused is refused before the work
    options: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "tokenizer": tokenizer}
    costs = measure_decode(network, ids, makers, **options, progress=watcher(quiet))
    rows = [_row(cost, costs[0], kept) for cost, kept in zip(costs, [None, *retentions], strict=True)]
    run = {"model": name, "plan": plan, "policy": choice.policy_name, "context_length": context}
    run |= {"new_tokens": new_tokens, "repeats": repeats, "batch_size": batch_size, "device": device_name(where)}
    run |= {"dtype": str(network.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    if json:
        opt.print_json({**run, "torch": torch.__version__, "dense": rows[0], "caches": rows[1:]})
    else:
        _report(rows, run)


def _retentions(choice: cache_options.CacheChoice, given: list[float] | None) -> list[float | None]:
    for kept in given or []:
        choice.check(kept)
    if given:
        return list(dict.fromkeys(given))
    if choice.name == "full":
        return [None]
    if choice.plan is None:
        return [*RETENTIONS]
    return [*reversed(choice.plan.retentions)]


def _ids(corpus: Any, count: int, length: int) -> torch.Tensor:
    """int64 [count, length] of the part that tune never searches, repeated where it is too short."""
    prefix = torch.tensor(corpus.prefix, dtype=torch.int64).expand(count, -1)
    body = length - len(corpus.prefix)
    rounds = -(-count * body // len(corpus.heldout))
    return torch.cat([prefix, corpus.heldout.repeat(rounds)[: count * body].view(count, body)], 1)


def _label(plan: str, retention: float | None) -> str:
    name = Path(plan).name
    return name if retention is None else f"{name} {retention:.4g}"


def _row(cost: Any, dense: Any, retention: float | None) -> dict[str, Any]:
    """The figures of one cache; ratios are to the stock one."""
    row = {
        "cache": cost.name,
        "ms_per_token": 1e3 * cost.median_token_seconds,
        "ms_per_token_of_each_repeat": [1e3 * seconds for seconds in cost.token_seconds],
        "token_ratio": cost.token_ratio(dense),
        "prefill_seconds": cost.median_prefill_seconds,
        "prefill_ratio": cost.prefill_ratio(dense),
        "bytes": cost.bytes,
        "bytes_ratio": cost.bytes / dense.bytes,
    }
    if cost is dense:
        return row
    kept = {"entries": cost.entries, "entries_seen": cost.entries_seen, "kept": cost.entries / cost.entries_seen}
    return {**row, "retention": retention, **kept, "evicted": cost.entries < cost.entries_seen}


def _report(rows: list[dict[str, Any]], run: dict[str, Any]) -> None:
    from rich.table import Table

    from kvpolicy.cli.terminal import Console

    title = "{model} on {device} in {dtype}: {batch_size} x {context_length} tokens, then {new_tokens}".format(**run)
    table = Table("cache", "kept", "ms a token", "x", "prompt, s", "x", "MB", "x", title=title)
    for row in rows:
        table.add_row(
            row["cache"],
            f"{row['kept']:.1%}" if "kept" in row else "100.0%",
            f"{row['ms_per_token']:.2f}",
            f"{row['token_ratio']:.2f}",
            f"{row['prefill_seconds']:.2f}",
            f"{row['prefill_ratio']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bytes_ratio']:.2f}",
        )
    console = Console()
    console.print(table)
    said = f"medians of {run['repeats']}, {run['threads']} threads; x: over the first row's"
    console.print(said, soft_wrap=True)
    for row in rows[1:]:
        if not row["evicted"] and row["retention"] is not None:
            said = f"{row['cache']}: nothing was evicted (--min-tokens keeps short prompts)"
            console.print(said, soft_wrap=True)
