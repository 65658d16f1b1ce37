"""The passkey check of a search: its prompts, and the levels with their scores."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from kvpolicy.budget.entry_format import least_entries
from kvpolicy.budget.plan import PlanLevel
from kvpolicy.errors import TextError
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.tasks.needles import equal_answers
from kvpolicy.tasks.questions import Question, make_passkeys
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning.job import Job
from kvpolicy.tuning.passkey import ABLE, PasskeyCheck
from kvpolicy.tuning.settings import TuneSettings
from kvpolicy.tuning.sizes import level_table
from kvpolicy.tuning.study_notes import StudyNotes

PROMPTS = 20


def passkey_check(
    model: Any,
    corpus: Corpus,
    settings: TuneSettings,
    policy: EvictionPolicy,
    notes: StudyNotes,
    numbers: Collection[str],
) -> PasskeyCheck | str:
    """The check, or why there is none. numbers: those of the search's prompts, which it asks for none of"""
    try:
        questions = _questions(corpus, settings, numbers)
    except TextError as error:
        return str(error)
    return PasskeyCheck(model, corpus.tokenizer, questions, policy, notes, settings.batch_size)


def _questions(corpus: Corpus, settings: TuneSettings, without: Collection[str]) -> list[Question]:
    """Prompts of the context's length. Raises `TextError` where there is no tokenizer, or the context is too short."""
    if corpus.tokenizer is None:
        raise TextError(f"the text {corpus.name} came without its tokenizer")
    seed = 3 * settings.seed + 2  # plans say what they found, so it stays what it was
    fits = equal_answers(corpus.tokenizer, seed, without)
    return make_passkeys(corpus.tokenizer, PROMPTS, settings.context_length, seed, fits)


def with_passkey_scores(
    job: Job, check: PasskeyCheck | str, levels: tuple[PlanLevel, ...]
) -> tuple[tuple[PlanLevel, ...], dict[str, Any]]:
    """The levels with their scores, where the model can do the task with the full cache, and what is known of that.

    check: or why there is none
    """
    if isinstance(check, str):
        job.progress.note(f"no passkey check: {check}")
        return levels, {"skipped": check}
    target, policy = job.search.target, job.method.policy
    tables = [
        level_table(target, x.shares, x.retention, check.length, least_entries(policy, x.entry_format)) for x in levels
    ]
    job.progress.begin("pass keys", 1)
    try:
        full, scores = check.scores(tables, [level.entry_format for level in levels])
        job.progress.advance()
    finally:
        job.progress.end()
    facts = {"full": full, "n": check.count, "length": check.length}
    sentence = f"held-out pass keys found: {full:.0%} of {check.count} with the full cache"
    if not scores:
        job.progress.note(f"{sentence}, fewer than {ABLE:.0%}: this model cannot do the task, so levels have no score")
        return levels, facts
    parts = [f"{score:.0%} at {level.retention:.0%} kept" for score, level in zip(scores, levels, strict=True)]
    job.progress.note(", ".join([sentence, *parts]))
    scored = (
        replace(level, retrieval=level.retrieval | {"passkey": {"score": score, **facts}})
        for level, score in zip(levels, scores, strict=True)
    )
    return tuple(scored), facts
