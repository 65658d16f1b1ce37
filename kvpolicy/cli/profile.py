"""`kvpolicy profile`: importance alone, without a search, and what can be asked about it."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.defaults import MODEL
from kvpolicy.errors import KVPolicyError, PluginError
from kvpolicy.files.regular import write_bytes
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import ImportanceEstimator

RANKED = ("cosine", "layer_cosine", "entropy", "retrieval")
"""The estimators that --agreement compares: those that only observe prompts. The first is the default without it."""


def profile(
    model: opt.Model = MODEL,
    estimator: Annotated[
        list[str] | None,
        typer.Option(
            help="Importance estimator; with --agreement several times. Default: cosine; with --agreement cosine, "
            "layer_cosine, entropy, retrieval.",
            show_default=False,
        ),
    ] = None,
    param: opt.Params = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text file; default: Python's own language reference. With --agreement several times.",
            show_default=False,
        ),
    ] = None,
    context: opt.Context = opt.DEFAULT_CONTEXT,
    agreement: Annotated[bool, typer.Option("--agreement", help="How alike are rankings of the KV heads?")] = False,
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
    out: Annotated[Path | None, typer.Option(help="Write what was measured as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a heat map; with --agreement its matrices.")] = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure how much each KV head matters, and show it.

    --agreement shows instead how alike the KV heads are ranked: on each calibration prompt alone; on each text, which
    is the search and the held-out part of every --text and of Python's language reference; and by several estimators.
    A parameter whose values are known, such as head_input of cosine, is tried with each.
    """
    names, texts = estimator or [], text or []
    _check(agreement, names, texts, token_map, layers)
    chosen = _estimators(names or (RANKED if agreement else RANKED[:1]), opt.parse_params(param), agreement)
    opt.check_context(context)
    for source in texts:
        opt.check_text(source)
    for path in (out, png, token_map, layers):
        if path is not None:
            opt.check_writable(path)
    where = opt.pick_device(device)

    from kvpolicy.cli.profile_agreement import measure_agreement
    from kvpolicy.cli.profile_heads import check_maps, measure_heads
    from kvpolicy.cli.profile_subject import Subject

    name, one = next(iter(chosen.items()))
    if token_map is not None:
        check_maps(name, one)
    progress = watcher(quiet)
    subject = Subject(model, context, progress, revision=revision, device=where, dtype=opt.pick_dtype(dtype, where))
    if agreement:
        answer = measure_agreement(subject, chosen, texts)
    else:
        answer = measure_heads(subject, name, one, next(iter(texts), None), token_map, layers)
    if out is not None:
        write_bytes(out, json_module.dumps(answer.document, indent=1, allow_nan=False).encode())
    if png is not None:
        write_bytes(png, answer.picture())
    if json:
        opt.print_json(answer.document)
        return
    from kvpolicy.cli.terminal import Console

    for said in answer.shown():
        Console().print(said)


def _check(
    agreement: bool, names: Sequence[str], texts: Sequence[Path], token_map: Path | None, layers: Path | None
) -> None:
    """Options that do not go together. Raises `KVPolicyError`."""
    if agreement and (token_map or layers):
        raise KVPolicyError("--agreement draws with --png: ask for --token-map and --layers in a run without it")
    for option, given in (("--estimator", names), ("--text", texts)):
        if len(given) > 1 and not agreement:
            raise KVPolicyError(f"{option} was given {len(given)} times: only --agreement takes more than one")


def _estimators(names: Sequence[str], params: dict[str, Any], with_variants: bool) -> dict[str, ImportanceEstimator]:
    """By name; with variants, by name and parameters. Raises `PluginError`."""
    if not with_variants:
        return {name: registry.create("estimator", name, params) for name in names}
    if params and len(names) > 1:
        raise PluginError(f"--param is of one estimator, and there are {len(names)}: {', '.join(names)}")

    from kvpolicy.measure.agreement import variants

    return {label: made for name in names for label, made in variants(name, params).items()}
