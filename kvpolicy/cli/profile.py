"""`kvpolicy profile`: importance alone, without a search."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import options as opt
from kvpolicy.cli.watch import watcher
from kvpolicy.files import write_bytes
from kvpolicy.registry import registry

if TYPE_CHECKING:
    from torch import Tensor


def profile(
    model: opt.Model = "smollm2-135m",
    estimator: Annotated[str, typer.Option(help="Who measures importance.")] = "cosine",
    param: opt.Params = None,
    text: opt.Text = None,
    context: opt.Context = opt.DEFAULT_CONTEXT,
    out: Annotated[Path | None, typer.Option(help="Write the importance as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a heat map.")] = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure how much each KV head matters, and show it."""
    chosen = registry.create("estimator", estimator, opt.parse_params(param))
    opt.check_context(context)
    for path in (out, png):
        if path is not None:
            opt.check_writable(path)
    where = opt.pick_device(device)

    from kvpolicy.integrations.transformers import TransformersProbe, load_model, read_corpus
    from kvpolicy.profiling import profile as run_profile

    progress = watcher(quiet)
    network, tokenizer = load_model(model, revision=revision, device=where, dtype=opt.pick_dtype(dtype, where))
    corpus = read_corpus(tokenizer, text)
    sequences, prompts = corpus.sequences("search", 1, context), corpus.prompts(context)
    probe = TransformersProbe(network, sequences, prompts, tokenize=corpus.tokenize)
    forwards = chosen.num_forwards(probe.spec, prompts=len(prompts), sequences=len(sequences))
    progress.note(f"'{estimator}' runs at most {forwards} forwards of up to {context} tokens")
    importance = run_profile(chosen, probe, forwards, progress)
    layers = probe.spec.budgeted_layers
    document = {
        "model": model,
        "estimator": {"name": estimator, "params": chosen.params()},
        "text_sha256": corpus.sha256,
        "budgeted_layers": list(layers),
        "per_head": importance.per_head.tolist(),
        "per_layer": _listed(importance.per_layer),
        "curves": _listed(importance.curves),
        "curve_capacities": _listed(importance.curve_capacities),
    }
    if out is not None:
        write_bytes(out, json_module.dumps(document, indent=1, allow_nan=False).encode())
    if png is not None:
        from kvpolicy.report.heatmap import importance_png

        write_bytes(png, importance_png(importance.per_head, layers, f"{model}\nimportance by {estimator}"))
    if json:
        opt.print_json(document)
        return
    from rich.console import Console

    from kvpolicy.report.terminal import importance_heatmap

    Console().print(importance_heatmap(importance.per_head, layers))


def _listed(values: Tensor | None) -> list[Any] | None:
    return None if values is None else values.tolist()
