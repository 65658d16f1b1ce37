"""Which layers of a model may attend over the entries of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.errors import KVPolicyError
from kvpolicy.verbs.profile_subject import Subject

TEXTS, LENGTH = 30, 64  # of KVSharer's calibration


@dataclass(frozen=True, slots=True, eq=False)
class SharingProfile:
    """What `kvpolicy.profile` with `sharing=` answers.

    shared_layers: which layer takes whose entries, as `new_cache(shared_layers=)` takes it
    document:      all of it, as JSON values
    plan:          the one that was given, with these layers
    """

    shared_layers: dict[int, int]
    document: dict[str, Any]
    plan: BudgetPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """What `kvpolicy profile --sharing N --json` prints."""
        return self.document


def measure_sharing(
    subject: Subject, count: int, text: Path | None, plan: BudgetPlan | None, *, most_similar: bool
) -> SharingProfile:
    """On 30 sequences of 64 tokens from the search part of the text.

    Raises `KVPolicyError` where no layer is found that a plan could have share.
    """
    if plan is not None:
        plan.check_model(subject.spec)
    corpus = subject.corpus(text)
    texts = corpus.sequences("search", TEXTS, LENGTH)
    answer = subject.sharing(texts, count, most_similar=most_similar)
    document = {
        "model": subject.name,
        "text_sha256": corpus.sha256,
        "order": "most similar first" if most_similar else "least similar first",
        "shared_layers": [list(pair) for pair in answer.shared_layers.items()],
        "similarity": list(answer.similarity),
        "pairs_tried": answer.tried,
    }
    if plan is not None and not answer.shared_layers:
        raise KVPolicyError(f"none of {answer.tried} pairs of layers may share, so there is no plan to write")
    own = None if plan is None else plan.sharing(subject.spec, answer.shared_layers)
    return SharingProfile(answer.shared_layers, document, own)
