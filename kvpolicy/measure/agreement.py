"""How alike importance ranks the KV heads: across prompts, across texts, across estimators."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.measure.ranks import chance_correlation, rank_correlation
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import ImportanceEstimator, ModelProbe
from kvpolicy.progress import Progress


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """Spearman's rank correlations of the importance of all KV heads; NaN where there is no ranking.

    estimators, prompts, texts: their names; E, P, T of them
    num_heads:  KV heads that are ranked
    estimator:  float64 `[E, E]`, on the first text
    prompt:     float64 `[E, P, P]`, each estimator with itself, on single prompts of the first text
    text:       float64 `[E, T, T]`, each estimator with itself, on the texts
    failures:   why a ranking is missing, by "estimator, text or prompt"
    """

    estimators: list[str]
    prompts: list[str]
    texts: list[str]
    num_heads: int
    estimator: Tensor
    prompt: Tensor
    text: Tensor
    failures: dict[str, str]

    def document(self) -> dict[str, Any]:
        """As JSON holds it: None for NaN."""
        return {
            "measure": "Spearman's rank correlation",
            "kv_heads": self.num_heads,
            "by_chance": chance_correlation(self.num_heads),
            "estimators": self.estimators,
            "prompts": self.prompts,
            "texts": self.texts,
            "across_estimators": _listed(self.estimator),
            "across_prompts": dict(zip(self.estimators, map(_listed, self.prompt), strict=True)),
            "across_texts": dict(zip(self.estimators, map(_listed, self.text), strict=True)),
            "failures": self.failures,
        }


def variants(name: str, params: Mapping[str, Any]) -> dict[str, ImportanceEstimator]:
    """The estimator with these parameters, and once more for each other value of each parameter that names its values.

    Keyed as a command line would name them, `cosine head_input=slice`. A parameter that is given is not varied.
    """
    chosen = registry.create("estimator", name, params)
    estimators = {_label(name, params): chosen}
    hints = get_type_hints(type(chosen))
    for field in dataclasses.fields(chosen):  # type: ignore[arg-type]  # the registry admits dataclasses only
        if field.name in params or get_origin(hints[field.name]) is not Literal:
            continue
        for value in get_args(hints[field.name]):
            if value != getattr(chosen, field.name):
                other = {**params, field.name: value}
                estimators[_label(name, other)] = registry.create("estimator", name, other)
    return estimators


def agreement(
    estimators: Mapping[str, ImportanceEstimator],
    texts: Mapping[str, ModelProbe],
    prompts: Mapping[str, ModelProbe],
    progress: Progress,
) -> Agreement:
    """Runs every estimator on every probe.

    texts:   a probe for each text; the first is the one that estimators are compared on
    prompts: a probe for each prompt of that text, which has it alone

    An estimator that cannot run on a probe, or finds all KV heads alike there, has no ranking there.
    """
    failures: dict[str, str] = {}
    by_text: list[list[Tensor | None]] = []
    by_prompt: list[list[Tensor | None]] = []
    progress.begin("agreement", len(estimators) * (len(texts) + len(prompts)))
    try:
        for name, estimator in estimators.items():
            by_text.append(_rankings(name, estimator, texts, failures, progress))
            by_prompt.append(_rankings(name, estimator, prompts, failures, progress))
            progress.note(f"ranked by {name}")
    finally:
        progress.end()
    heads = math.prod(next(iter(texts.values())).spec.table_shape)
    return Agreement(
        estimators=list(estimators),
        prompts=list(prompts),
        texts=list(texts),
        num_heads=heads,
        estimator=_matrix([rankings[0] for rankings in by_text]),
        prompt=torch.stack([_matrix(rankings) for rankings in by_prompt]),
        text=torch.stack([_matrix(rankings) for rankings in by_text]),
        failures=failures,
    )


def pairs(matrix: Tensor) -> list[float]:
    """The correlations of two different things that a matrix `[n, n]` has, each once."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return [value for value in matrix[rows, columns].tolist() if not math.isnan(value)]


def _rankings(
    name: str,
    estimator: ImportanceEstimator,
    probes: Mapping[str, ModelProbe],
    failures: dict[str, str],
    progress: Progress,
) -> list[Tensor | None]:
    """What is ranked on each probe, `[L * H]`, or None with its reason in `failures`."""
    rankings: list[Tensor | None] = []
    for where, probe in probes.items():
        try:
            values = plugin_call.importance(estimator, probe).per_head.flatten()
            if bool((values == values[0]).all()):
                raise PluginError("all KV heads are equally important, so nothing is ranked")
            rankings.append(values)
        except PluginError as error:
            failures[f"{name}, {where}"] = str(error)
            rankings.append(None)
        progress.advance()
    return rankings


def _matrix(rankings: Sequence[Tensor | None]) -> Tensor:
    """float64 `[n, n]`, NaN in the rows and columns of a missing one."""
    matrix = torch.full((len(rankings), len(rankings)), math.nan, dtype=torch.float64)
    for (i, a), (j, b) in itertools.product(enumerate(rankings), repeat=2):
        if a is not None and b is not None:
            matrix[i, j] = 1.0 if i == j else rank_correlation(a, b)
    return matrix


def _label(name: str, params: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in params.items())])


def _listed(matrix: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else round(value, 4) for value in row] for row in matrix.tolist()]
