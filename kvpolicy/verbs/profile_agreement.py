"""How alike importance ranks the KV heads: on prompts, on texts, by several estimators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.errors import TextError
from kvpolicy.files.regular import write_bytes
from kvpolicy.measure.agreement import Agreement, agreement
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import ImportanceEstimator, ModelProbe
from kvpolicy.verbs.profile_subject import Subject


@dataclass(frozen=True, slots=True, eq=False)
class AgreementProfile:
    """What `kvpolicy.profile` with `agreement=True` answers.

    agreement: the rank correlations
    document:  all of it, as JSON values
    """

    agreement: Agreement
    document: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `kvpolicy profile --agreement --json` prints."""
        return self.document


def measure_agreement(
    subject: Subject, estimators: Mapping[str, ImportanceEstimator], texts: Sequence[Path], png: Path | None
) -> AgreementProfile:
    """On the search and the held-out part of each text and of the default one, and on each prompt of the first."""
    by_text: dict[str, ModelProbe] = {}
    by_prompt: dict[str, ModelProbe] = {}
    digests: dict[str, str] = {}
    for corpus in [subject.corpus(path) for path in (*texts, None)]:
        if corpus.name in digests:
            raise TextError(f"text=: two texts are called {corpus.name}; give each another file name to compare them")
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
    result = agreement(estimators, by_text, by_prompt, subject.progress)
    if png is not None:
        from kvpolicy.report.agreement_figure import agreement_png

        title = subject.title("agreement of rankings of the KV heads", next(iter(by_text)))
        write_bytes(png, agreement_png(result, title))
    document = {"model": subject.name, "context": subject.context, "texts_sha256": digests, **result.document()}
    return AgreementProfile(result, document)
