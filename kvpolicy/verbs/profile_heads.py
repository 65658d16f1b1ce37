"""The importance of every KV head by one estimator, and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.files.regular import write_bytes
from kvpolicy.measure.ablation import ablate_layers, num_forwards
from kvpolicy.measure.profiling import profile
from kvpolicy.model.spec import Importance
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import ImportanceEstimator
from kvpolicy.text.corpus import Corpus
from kvpolicy.verbs.profile_subject import Subject

SEQUENCES = 4  # of the losses of `layers`, as many as a search of `tune` takes


def check_maps(name: str, estimator: ImportanceEstimator) -> None:
    """Raises `PluginError` for an estimator that has no token maps, with those that have."""
    if not estimator.token_measure:
        able = [other for other in registry.names("estimator") if registry.get("estimator", other).token_measure]
        raise PluginError(
            f"token_map=: the estimator '{name}' has no value for each token; these have: {', '.join(able) or 'none'}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeadProfile:
    """What `kvpolicy.profile` answers.

    importance:      by the estimator
    budgeted_layers: the layers of the model that it is of, in order
    document:        all of it, as JSON values
    """

    importance: Importance
    budgeted_layers: tuple[int, ...]
    document: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `kvpolicy profile --json` prints."""
        return self.document


def measure_heads(
    subject: Subject,
    name: str,
    estimator: ImportanceEstimator,
    text: Path | None,
    *,
    token_map: Path | None,
    layers: Path | None,
    png: Path | None,
) -> HeadProfile:
    """token_map, layers, png: where pictures are drawn."""
    corpus = subject.corpus(text)
    sequences, prompts = corpus.sequences("search", 1, subject.context), corpus.prompts(subject.context)
    probe = subject.probe(corpus, sequences, prompts)
    spec = probe.spec
    forwards = plugin_call.num_forwards(estimator, spec, prompts=len(prompts), sequences=len(sequences))
    subject.progress.note(f"'{name}' runs at most {forwards} forwards of up to {subject.context} tokens")
    importance = profile(estimator, probe, forwards, subject.progress)
    document: dict[str, Any] = {
        "model": subject.name,
        "estimator": {"name": name, "params": plugin_call.params_of(estimator)},
        "text_sha256": corpus.sha256,
        "budgeted_layers": list(spec.budgeted_layers),
        "per_head": importance.per_head.tolist(),
        "per_layer": _listed(importance.per_layer),
        "curves": _listed(importance.curves),
        "curve_capacities": _listed(importance.curve_capacities),
    }
    if token_map is not None:
        _draw_maps(subject, name, estimator, corpus, importance, token_map)
    if layers is not None:
        document["layers"] = _draw_layers(subject, name, corpus, importance, layers)

    if png is not None:
        from kvpolicy.report.heatmap import importance_png

        title = f"{subject.name}\nimportance by {name}"
        write_bytes(png, importance_png(importance.per_head, spec.budgeted_layers, title))
    return HeadProfile(importance, tuple(spec.budgeted_layers), document)


def _draw_maps(
    subject: Subject, name: str, estimator: ImportanceEstimator, corpus: Corpus, importance: Importance, path: Path
) -> None:
    """The shortest and the longest calibration prompt."""
    from kvpolicy.report.token_maps import token_maps_png

    prompts = corpus.prompts(subject.context)
    probe = subject.probe(corpus, corpus.sequences("search", 1, subject.context), [prompts[0], prompts[-1]])
    maps = plugin_call.token_maps(estimator, probe)
    title = subject.title(f"{estimator.token_measure}, by '{name}'", corpus.name)
    write_bytes(path, token_maps_png(maps, importance.per_head, probe.spec, estimator.token_measure, title))


def _draw_layers(subject: Subject, name: str, corpus: Corpus, importance: Importance, path: Path) -> dict[str, Any]:
    """Measures each layer; returns the values."""
    from kvpolicy.report.layers import layers_png

    probe = subject.probe(corpus, corpus.sequences("search", SEQUENCES, subject.context))
    count = num_forwards(probe.spec, SEQUENCES)
    subject.progress.note(f"layers= runs {count} forwards of {subject.context} tokens")
    measured = ablate_layers(probe, subject.progress)
    title = subject.title(f"does the importance of a layer by '{name}' say what shrinking it costs?", corpus.name)
    write_bytes(path, layers_png(importance, measured, probe.spec.budgeted_layers, title))
    return measured.document(importance)


def _listed(values: Tensor | None) -> list[Any] | None:
    return None if values is None else values.tolist()
