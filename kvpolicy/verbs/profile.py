"""Importance alone, without a search, and what can be asked about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy.budget.plan import load_plan, save_plan
from kvpolicy.defaults import CONTEXT, MODEL
from kvpolicy.errors import KVPolicyError, PluginError
from kvpolicy.files.regular import write_bytes
from kvpolicy.plugins.registry import registry
from kvpolicy.plugins.roles import ImportanceEstimator
from kvpolicy.progress import Progress
from kvpolicy.verbs import arguments

if TYPE_CHECKING:
    from kvpolicy.verbs.profile_agreement import AgreementProfile
    from kvpolicy.verbs.profile_heads import HeadProfile
    from kvpolicy.verbs.profile_sharing import SharingProfile

RANKED = ("cosine", "layer_cosine", "entropy", "retrieval")
"""Whose agreement is measured: the estimators that only observe prompts. Without it the first is the default."""


def profile(
    model: str | Path = MODEL,
    *,
    estimator: str | Sequence[str] | None = None,
    param: Mapping[str, Any] | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    context: int = CONTEXT,
    agreement: bool = False,
    sharing: int | None = None,
    most_similar: bool = False,
    plan: str | Path | None = None,
    token_map: str | Path | None = None,
    layers: str | Path | None = None,
    out: str | Path | None = None,
    png: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> HeadProfile | AgreementProfile | SharingProfile:
    """Measures how much each KV head matters; or, with `agreement`, how alike the KV heads are ranked; or, with
    `sharing`, which layers may do without entries of their own.

    model:     a Hub id, a directory, a .gguf file, or the built-in smollm2-135m
    estimator: None for cosine; with `agreement` several, None for cosine, layer_cosine, entropy, retrieval
    param:     parameters of the estimator, by name
    text:      a UTF-8 file, with `agreement` several; None for Python's language reference
    context:   tokens of one sequence
    agreement: rank on each prompt alone, on each text, and by several estimators; a parameter whose values are known,
               such as head_input of cosine, is tried with each
    sharing:   look for so many layers that attend over an earlier layer's entries and keep none (KVSharer), least
               similar ones first, on 30 pieces of 64 tokens
    most_similar: look for them among the most similar ones first
    plan:      a plan file: `out` becomes this plan with the layers that `sharing` found
    token_map: draw tokens by heads into this file (after BaKlaVa's figure 2)
    layers:    shrink each layer alone, and draw into this file what it costs over its importance (after figure 4)
    out:       write what was measured as JSON, or the plan
    png:       draw a heat map; with `agreement` its matrices

    Raises `BudgetError`, `KVPolicyError` for arguments that do not go together, `ModelError`, `PlanError`,
    `PluginError`, `TextError`.
    """
    names, texts = arguments.several(estimator), [Path(path) for path in arguments.several(text)]
    pictures = {"token_map": arguments.optional_path(token_map), "layers": arguments.optional_path(layers)}
    _check(agreement, names, texts, any(pictures.values()))
    if sharing is not None or most_similar:
        _check_sharing(sharing, agreement or bool(names) or png is not None or any(pictures.values()))
    if plan is not None and (sharing is None or out is None):
        raise KVPolicyError("plan= is a plan that is written to out= with the layers that sharing= finds: give both")
    loaded = None if plan is None else load_plan(plan)
    estimators = _estimators(names or (RANKED if agreement else RANKED[:1]), dict(param or {}), agreement)
    arguments.check_context(context)
    for source in texts:
        arguments.check_text(source)
    page, picture = arguments.optional_path(out), arguments.optional_path(png)
    for path in (page, picture, *pictures.values()):
        arguments.check_writable(path)
    where = arguments.pick_device(device)
    number = arguments.pick_dtype(dtype, where)

    name, first = next(iter(estimators.items()))
    progress = progress or Progress()
    with progress.wait(f"loading {model}"):
        from kvpolicy.verbs.profile_agreement import measure_agreement
        from kvpolicy.verbs.profile_heads import check_maps, measure_heads
        from kvpolicy.verbs.profile_sharing import SharingProfile, measure_sharing
        from kvpolicy.verbs.profile_subject import Subject

        if pictures["token_map"] is not None:
            check_maps(name, first)
        subject = Subject(str(model), context, progress, revision=revision, device=where, dtype=number)
    answer: HeadProfile | AgreementProfile | SharingProfile
    if sharing is not None:
        answer = measure_sharing(subject, sharing, next(iter(texts), None), loaded, most_similar=most_similar)
    elif agreement:
        answer = measure_agreement(subject, estimators, texts, picture)
    else:
        answer = measure_heads(subject, name, first, next(iter(texts), None), **pictures, png=picture)
    if page is not None and isinstance(answer, SharingProfile) and answer.plan is not None:
        save_plan(answer.plan, page)
    elif page is not None:
        write_bytes(page, json.dumps(answer.to_json(), indent=1, allow_nan=False).encode())
    return answer


def _check(agreement: bool, names: Sequence[str], texts: Sequence[Path], draws: bool) -> None:
    """Arguments that do not go together. Raises `KVPolicyError`."""
    if agreement and draws:
        raise KVPolicyError("agreement=True draws with png=: ask for token_map= and layers= in a run without it")
    for argument, values in (("estimator", names), ("text", texts)):
        if len(values) > 1 and not agreement:
            raise KVPolicyError(f"{argument}= was given {len(values)} times: only agreement=True takes more than one")


def _check_sharing(sharing: int | None, has_others: bool) -> None:
    """Raises `KVPolicyError` for arguments that do not go with `sharing`, or not without it."""
    if sharing is None:
        raise KVPolicyError("most_similar=True is the order in which sharing= looks for layers: say how many")
    if has_others:
        raise KVPolicyError("sharing= looks for layers alone: estimator=, agreement= and pictures are of other runs")


def _estimators(names: Sequence[str], params: dict[str, Any], with_variants: bool) -> dict[str, ImportanceEstimator]:
    """By name; with variants, by name and parameters. Raises `PluginError`."""
    if not with_variants:
        return {name: registry.create("estimator", name, params) for name in names}
    if params and len(names) > 1:
        raise PluginError(f"param= is of one estimator, and there are {len(names)}: {', '.join(names)}")

    from kvpolicy.measure.agreement import variants

    return {label: made for name in names for label, made in variants(name, params).items()}
