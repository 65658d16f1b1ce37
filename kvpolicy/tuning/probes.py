"""What losses are measured on: text and needle prompts, for the search and held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.budget.entry_format import Format
from kvpolicy.errors import TextError
from kvpolicy.integrations.transformers import PromptProbe, SequenceProbe
from kvpolicy.measure.evaluation import probe_for
from kvpolicy.plugins import plugin_call
from kvpolicy.plugins.roles import EvictionPolicy
from kvpolicy.plugins.task_role import Task
from kvpolicy.tasks.known_answers import KnownAnswer, known_answer, split_samples
from kvpolicy.tasks.needles import Needles, make_needles
from kvpolicy.tasks.question_time import check_question
from kvpolicy.text.corpus import Corpus
from kvpolicy.tuning.joined import JoinedProbe
from kvpolicy.tuning.settings import (
    HELDOUT_NEEDLES,
    HELDOUT_SEQUENCES,
    LEAST_HELDOUT,
    NEEDLES_PER_SEQUENCE,
    TuneSettings,
)
from kvpolicy.tuning.task_probe import TaskProbe

_PROMPTS = 6  # of `Corpus.prompts`
_FIRST_SEED = 10**9  # `eval` and `compare` count from 0: what a search has learned from is not among their prompts


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Of each sequence, float64, nats per scored token; `target` is what the objective goes by.

    text: `[n]`;  answers: `[m]`, of needle prompts or a task, None under the objective "perplexity"
    """

    text: Tensor
    answers: Tensor | None
    target: Tensor


Target = SequenceProbe | TaskProbe | JoinedProbe
"""What an objective is measured on."""


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """The search's probes, or the held-out ones.

    answers: prompts that are compressed once, scored by the tokens of their answers: needles, or a task's; None under
             "perplexity"
    target:  the text, the answers, or both joined: what the objective is measured on
    """

    text: SequenceProbe
    answers: PromptProbe | TaskProbe | None
    target: Target

    def losses(self, table: Callable[[int], Tensor]) -> Losses:
        """table: capacities int `[L, H]` for a context length; text and answers may differ in theirs"""
        text = self.text.loss(table(self.text.context_length))
        answers = None if self.answers is None else self.answers.loss(table(self.answers.context_length))
        return self.scored(text, answers)

    def scored(self, text: Tensor, answers: Tensor | None) -> Losses:
        """Losses of the text's sequences and of the answers, with what the objective makes of them."""
        if answers is None:
            return Losses(text, None, text)
        return Losses(
            text, answers, self.target.joined(text, answers) if isinstance(self.target, JoinedProbe) else answers
        )

    def full_table(self, context: int) -> Tensor:
        """Capacities `[L, H]` under which nothing is evicted."""
        return torch.full(self.text.spec.table_shape, context)

    @property
    def all(self) -> tuple[SequenceProbe | TaskProbe, ...]:
        """Text and answers, as far as there are any."""
        return (self.text,) if self.answers is None else (self.text, self.answers)

    @property
    def parts(self) -> Sequence[SequenceProbe | TaskProbe]:
        """What the target is made of."""
        return self.target.parts if isinstance(self.target, JoinedProbe) else (self.target,)

    def seconds(self, forward: float) -> float:
        """What a sequence of the target takes in a trial, on average. Runs its prompts.

        forward: seconds of one forward of a whole sequence
        """
        total = sum(part.seconds(forward) * part.num_sequences for part in self.parts)
        return total / self.target.num_sequences


def make_probes(
    model: Any, corpus: Corpus, settings: TuneSettings, policy: EvictionPolicy, entry_format: Format = None
) -> tuple[Probes, Probes, frozenset[str]]:
    """The search's probes (with the profiling prompts), the held-out ones, and the answers that the search asks for.

    entry_format: of the entries

    Raises `TextError` for a text that is too short, and where prompts with answers cannot be made.
    """
    length = settings.context_length
    count, least = min(HELDOUT_SEQUENCES, corpus.room("heldout", length)), max(_PROMPTS, settings.sequences)
    if count < LEAST_HELDOUT or corpus.room("search", length) < least:
        raise TextError(
            f"{corpus.name} is too short: after repetitions are dropped it has {len(corpus.search)} tokens to search "
            f"on and {len(corpus.heldout)} to report on, a context of {length} with {settings.sequences} search "
            f"sequences needs {least * length} and {LEAST_HELDOUT * length}; give a longer text= or a smaller "
            "context_length=, or fewer sequences="
        )
    options: dict[str, Any] = {"batch_size": settings.batch_size, "tokenizer": corpus.tokenizer}
    options["entry_format"] = entry_format
    profiling: dict[str, Any] = {"prompts": corpus.prompts(length), "tokenize": corpus.tokenize}
    prefill: dict[str, Any] = {"prefill_length": settings.prefill_length}
    sequences = corpus.sequences("search", settings.sequences, length)
    text = probe_for(policy, model, sequences, **profiling, **prefill, **options)
    heldout = probe_for(policy, model, corpus.sequences("heldout", count, length), **prefill, **options)
    if settings.objective == "perplexity":
        return Probes(text, None, text), Probes(heldout, None, heldout), frozenset()
    if settings.task is not None:
        (mine, others), texts = _of_task(settings.task, corpus, settings)
        of_task = TaskProbe(model, mine, policy=policy, **profiling, **options)
        other = TaskProbe(model, others, policy=policy, **options)
        return Probes(text, of_task, of_task), Probes(heldout, other, other), texts
    prompt = length if settings.objective == "retrieval" else text.context_length
    needles, heldout_needles = _needles(corpus, settings, prompt)
    options |= {"policy": policy, "prefill_length": prompt}
    answers = PromptProbe(model, needles.sequences, **profiling, **options)
    heldout_answers = PromptProbe(model, heldout_needles.sequences, **options)
    return (
        _joined(settings.objective, text, answers),
        _joined(settings.objective, heldout, heldout_answers),
        needles.answers,
    )


def _of_task(task: Task, corpus: Corpus, settings: TuneSettings) -> tuple[list[list[KnownAnswer]], frozenset[str]]:
    """The search's answers and the held-out ones, which are about other contexts, and the texts of the search's."""
    tokenizer, seed = _tokenizer(corpus, settings), _prompt_seed(settings, 0)
    search, question = NEEDLES_PER_SEQUENCE * settings.sequences, check_question(settings.question)
    count = search + HELDOUT_NEEDLES
    samples = plugin_call.task_samples(task, tokenizer, count, settings.context_length, seed)
    parts = split_samples(samples, search, HELDOUT_NEEDLES, seed)
    texts = frozenset(text for sample in parts[0] for turn in sample.turns for text in turn.answers)
    return [[known_answer(task, tokenizer, sample, question) for sample in part] for part in parts], texts


def _joined(objective: str, text: SequenceProbe, needles: PromptProbe) -> Probes:
    return Probes(text, needles, needles if objective == "retrieval" else JoinedProbe(text, needles))


def _needles(corpus: Corpus, settings: TuneSettings, length: int) -> tuple[Needles, Needles]:
    """The search's and the held-out ones, which ask for other numbers."""
    tokenizer = _tokenizer(corpus, settings)
    count, seed = NEEDLES_PER_SEQUENCE * settings.sequences, _prompt_seed(settings, 0)
    search = make_needles(tokenizer, count, length, seed)
    seed = _prompt_seed(settings, 1)
    return search, make_needles(tokenizer, HELDOUT_NEEDLES, length, seed, without=search.answers)


def _tokenizer(corpus: Corpus, settings: TuneSettings) -> Any:
    if corpus.tokenizer is None:
        raise TextError(
            f"the objective {settings.objective} makes prompts of its own, and the text {corpus.name} came without its "
            "tokenizer: make it with read_corpus(tokenizer, path)"
        )
    return corpus.tokenizer


def _prompt_seed(settings: TuneSettings, purpose: int) -> int:
    """Seeds of prompts that differ for the search (0) and what is held out (1)."""
    return _FIRST_SEED + 3 * settings.seed + purpose
