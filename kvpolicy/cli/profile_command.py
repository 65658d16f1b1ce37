"""`kvpolicy profile`: importance alone, without a search, and what can be asked about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.defaults import CONTEXT, MODEL
from kvpolicy.plugins.params import parse_params

if TYPE_CHECKING:
    from kvpolicy.verbs.profile_agreement import AgreementProfile
    from kvpolicy.verbs.profile_heads import HeadProfile
    from kvpolicy.verbs.profile_sharing import SharingProfile


def profile_command(
    model: opt.Model = MODEL,
    estimator: Annotated[
        list[str] | None,
        typer.Option(
            help="Importance estimator; with --agreement repeatable. Default: cosine; with --agreement cosine, "
            "layer_cosine, entropy, retrieval.",
            show_default=False,
        ),
    ] = None,
    param: opt.Params = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text file; default: Python's own language reference. With --agreement repeatable.",
            show_default=False,
        ),
    ] = None,
    context: opt.Context = CONTEXT,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Show how well rankings of the KV heads agree.")
    ] = False,
    sharing: Annotated[
        int | None,
        typer.Option(
            help="Look for so many layers that can attend over an earlier layer's entries and keep none (KVSharer).",
            show_default=False,
        ),
    ] = None,
    most_similar: Annotated[
        bool, typer.Option("--most-similar", help="With --sharing: try the most similar layers first, not the least.")
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="With --sharing: write this plan, with the layers that were found, to --out.", show_default=False
        ),
    ] = None,
    token_map: Annotated[
        Path | None,
        typer.Option(
            "--token-map", "--figure2", help="Draw tokens by heads (after BaKlaVa's figure 2).", show_default=False
        ),
    ] = None,
    layers: Annotated[
        Path | None,
        typer.Option(
            "--layers",
            "--figure4",
            help="Shrink each layer alone, and draw what it costs over its importance (after BaKlaVa's figure 4).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write what was measured as JSON; with --plan, the plan.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a heat map; with --agreement, the matrices.")] = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure how much each KV head matters, and show it.

    --agreement shows instead how well rankings of the KV heads agree: across calibration prompts, across texts (the
    search and the held-out part of every --text and of Python's language reference), and across estimators. A
    parameter with a fixed set of values, such as head_input of cosine, is tried with each of them.

    --sharing shows instead which layers can do without entries of their own, and whose they attend over; with --plan
    it writes a plan under which they do.
    """
    from kvpolicy.verbs.profile import profile

    answer = profile(
        model,
        estimator=estimator,
        param=parse_params(param, "--param"),
        text=text,
        context=context,
        agreement=agreement,
        sharing=sharing,
        most_similar=most_similar,
        plan=plan,
        token_map=token_map,
        layers=layers,
        out=out,
        png=png,
        device=device,
        dtype=dtype,
        revision=revision,
        progress=watcher(quiet),
    )
    if json:
        opt.print_json(answer.to_json())
        return
    from kvpolicy.cli.terminal import Console

    for part in _shown(answer):
        Console().print(part)


def _shown(answer: HeadProfile | AgreementProfile | SharingProfile) -> Iterable[Any]:
    """Lines and tables for the terminal."""
    from kvpolicy.report.agreement_tables import tables
    from kvpolicy.verbs.profile_agreement import AgreementProfile
    from kvpolicy.verbs.profile_sharing import SharingProfile

    if isinstance(answer, SharingProfile):
        return _sharing(answer)
    return tables(answer.agreement) if isinstance(answer, AgreementProfile) else _heads(answer)


def _heads(answer: HeadProfile) -> Iterator[Any]:
    from kvpolicy.report.terminal_heatmap import importance_heatmap

    per_head, measured = answer.importance.per_head, answer.document.get("layers")
    yield importance_heatmap(per_head, answer.budgeted_layers)
    if measured is None:
        return
    for name, correlation in measured["correlation"].items():
        rank = "no ranking, all are alike" if correlation is None else f"rank correlation {correlation:+.2f}"
        yield f"{name} of a layer, and what shrinking it costs: {rank}, {len(per_head)} layers"
    yield f"unrelated rankings stay within {measured['by_chance']:.2f} of 0 in 95 % of cases"


def _sharing(answer: SharingProfile) -> Iterator[Any]:
    pairs = zip(answer.shared_layers.items(), answer.document["similarity"], strict=True)
    for (layer, owner), cosine in pairs:
        yield f"layer {layer} takes layer {owner}'s entries: cosine {cosine:.3f} of the last hidden states"
    yield f"{len(answer.shared_layers)} layers, {answer.document['pairs_tried']} pairs tried"
