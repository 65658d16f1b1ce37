"""Losses that a search reports, kept in its study: a search that is resumed measures none of them twice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvpolicy.tuning.probes import Losses, Probes
from kvpolicy.tuning.study_notes import StudyNotes


def known_losses(notes: StudyNotes, part: str, probes: Probes, table: Callable[[int], Tensor]) -> Losses:
    """`probes.losses(table)`, or what the notes have of it. part: whose probes they are, search or heldout"""
    tables = [table(probe.context_length) for probe in probes.all]
    if (text_and_answers := notes.losses(part, tables)) is not None:
        return probes.scored(*text_and_answers)
    losses = probes.losses(table)
    notes.keep_losses(part, tables, losses.text, losses.answers)
    return losses
