"""`kvpolicy profile --agreement`: how alike importance ranks the KV heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpolicy.cli.profile_subject import Answer, Subject
from kvpolicy.errors import TextError
from kvpolicy.measure.agreement import agreement
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import ImportanceEstimator, ModelProbe


def measure_agreement(subject: Subject, estimators: Mapping[str, ImportanceEstimator], texts: Sequence[Path]) -> Answer:
    """On the search and the held-out part of each text and of the default one, and on each prompt of the first."""
    by_text: dict[str, ModelProbe] = {}
    by_prompt: dict[str, ModelProbe] = {}
    digests: dict[str, str] = {}
    for corpus in [subject.corpus(path) for path in (*texts, None)]:
        if corpus.name in digests:
            raise TextError(f"--text: two texts are called {corpus.name}; give each another file name to compare them")
        digests[corpus.name] = corpus.sha256
        for part in ("search", "heldout"):
            prompts, sequences = corpus.prompts(subject.context, part), corpus.sequences(part, 1, subject.context)
            by_text[f"{corpus.name}, {part} part"] = subject.probe(corpus, sequences, prompts)
            if not by_prompt:
                by_prompt = {
                    f"prompt {number} of {len(prompt)} tokens": subject.probe(corpus, prompt[None], [prompt])
                    for number, prompt in enumerate(prompts, 1)
                }
    probes: list[ModelProbe] = [*by_text.values(), *by_prompt.values()]
    forwards = sum(
        plugin_call.num_forwards(estimator, probe.spec, prompts=len(probe.prompts), sequences=1)
        for estimator in estimators.values()
        for probe in probes
    )
    subject.progress.note(
        f"{len(estimators)} rankings run at most {forwards} forwards of up to {subject.context} tokens"
    )
    found = agreement(estimators, by_text, by_prompt, subject.progress)
    first = next(iter(by_text))

    def picture() -> bytes:
        from kvpolicy.report.agreement_figure import agreement_png

        return agreement_png(found, subject.title("agreement of rankings of the KV heads", first))

    def shown() -> Iterable[Any]:
        from kvpolicy.report.agreement_tables import tables

        return tables(found)

    document = {"model": subject.name, "context": subject.context, "texts_sha256": digests, **found.document()}
    return Answer(document, picture, shown)
