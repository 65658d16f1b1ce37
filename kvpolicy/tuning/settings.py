"""What a search is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from kvpolicy.budget.entry_format import MODEL, named
from kvpolicy.defaults import RETENTIONS
from kvpolicy.errors import BudgetError, StudyError
from kvpolicy.plugins.task_role import Task
from kvpolicy.tasks.family import task_of
from kvpolicy.tasks.question_time import check_question
from kvpolicy.tuning.search import Sampler
from kvpolicy.tuning.storage import journal_of

Objective = Literal["perplexity", "retrieval", "mixed"]
AUTO = "auto"
"""Instead of the name of a format: one for each layer, found by curves."""
OF_TASK = "task:"
OF_FILE = f"{OF_TASK}file"
"""What an objective begins with that goes by the answers of a registered task, and the one of a file of questions."""
HELDOUT_SEQUENCES, LEAST_HELDOUT = 8, 4
NEEDLES_PER_SEQUENCE, HELDOUT_NEEDLES = 4, 32
"""Needle prompts for each search sequence, as many as a sequence has chunks, and held-out ones; half are pass keys. As
many samples of a task."""
MAX_LOSS_RETENTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""What the command line goes through under `max_loss` where no retentions are given."""


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """What a search does. Defaults are the command line's.

    retentions: kept fractions of the entries, each in (0, 1); one study each
    memories:   instead, parts of the full cache's bytes, everything counted, each in (0, 1): in the model's dtype, or
                as of 16-bit numbers under `choose_dtype`
    format:     of the entries that are searched for, "int8" or "int4", or "auto", one for each layer by curves that the
                estimator measures; the plan records it
    objective:  what a trial is measured by: "perplexity" on the text, "retrieval" (the loss of the answers' tokens
                behind needle prompts that the policy compresses once), "mixed", half and half, or "task:NAME", the
                loss of the answers of a registered task
    question:   of a task: "aware" compresses a context with its question, "agnostic" before the question comes
    data:       the folder of a task's files; under "task:file" the file
    max_loss:   stop at the first retention, from the largest, whose held-out loss is above the full cache's by more
                than this part of it (upper end of the 95 % interval); the plan holds those before it
    sequences:  of the text, in each trial; four needle prompts for each
    policy:     who evicts; a window rule is searched by the loss of decoding from the first token on, any other policy
                by the loss behind a prompt that it compresses once
    policy_params: the policy's own; with none, its defaults, or what a search of its parameters finds, if it has a
                `suggest`: once for all levels, under uniform budgets at the smallest retention
    prefill_length: tokens of that prompt, None for half of the context; under a window rule, tokens at the start that
                attend densely, None for none
    trials:     of each level, and of a search of the policy; None chooses 8 to 40 so that all of them fit about 200
                seconds on this machine
    allocator_params: of an allocator that learns; those of any other are searched
    out:        the plan's path, after which studies are named; saving the plan is the caller's
    storage:    where trials are kept, for `resume` and for other processes: a file, or an Optuna storage URL; None is
                memory, and no file is written. Losses of profiling lie beside the file, or beside `out`
    resume:     go on with the search in `storage` that has these settings, where there is one; otherwise a new one is
                begun, and what is there stays
    choose_dtype: let an fp32 model on a CPU run in bf16 where that is faster and agrees
    """

    estimator: str = "cosine"
    estimator_params: dict[str, Any] | None = None
    allocator: str = "baklava"
    allocator_params: dict[str, Any] | None = None
    policy: str = "streaming"
    policy_params: dict[str, Any] | None = None
    retentions: tuple[float, ...] = RETENTIONS
    memories: tuple[float, ...] = ()
    format: str = MODEL
    objective: str = "perplexity"
    question: str = "aware"
    data: Path | None = None
    max_loss: float | None = None
    sequences: int = 4
    context_length: int = 1024
    prefill_length: int | None = None
    trials: int | None = None
    seed: int = 0
    sampler: Sampler = "tpe"
    batch_size: int = 1
    out: Path = Path("plan.json")
    storage: str | Path | None = field(default=None, repr=False)  # a URL may hold a password
    resume: bool = False
    choose_dtype: bool = True

    def __post_init__(self) -> None:
        if self.memories and self.retentions != RETENTIONS:
            raise BudgetError("memories= and retentions= were given: give one of them")
        if self.format != AUTO:
            named(self.format)
        elif not self.memories:
            raise BudgetError("format=auto spends bytes: give memories=, parts of the full cache's")
        for level in self.levels:
            if not 0 < level < 1:
                raise BudgetError(f"a {self.size} to tune must lie in (0, 1), got {level:g} (1 keeps everything)")
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise BudgetError(f"give each {self.size} once, got {', '.join(map(str, self.levels)) or 'none'}")
        self._check_objective()
        if self.max_loss is not None and not 0 < self.max_loss < math.inf:
            raise BudgetError(
                f"max_loss is a part of the full cache's loss, above 0 (0.02 is 2 %); got {self.max_loss:g}"
            )
        for name, least in (("context_length", 64), ("trials", 1), ("batch_size", 1), ("sequences", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BudgetError(f"{name} must be at least {least}, got {value}")

        if self.prefill_length is not None and not 0 <= self.prefill_length < self.context_length:
            raise BudgetError(
                f"prefill_length must be below the context of {self.context_length}, got {self.prefill_length}"
            )

        if self.resume and self.storage is None:
            raise StudyError("resume=True goes on with a search that was kept: give storage=, the file or URL it is in")

    def _check_objective(self) -> None:
        check_question(self.question)
        if self.task is not None:
            return
        if self.objective not in get_args(Objective):
            names = ", ".join(get_args(Objective))
            raise BudgetError(f"objective must be one of {names}, got '{self.objective}'; a task's is {OF_TASK}NAME")
        if self.data is not None or self.question != "aware":
            raise BudgetError(f"data= and question= go with objective={OF_TASK}NAME, not with {self.objective}")

    @property
    def size(self) -> Literal["retention", "memory"]:
        """What a level's number is of: entries, or bytes."""
        return "memory" if self.memories else "retention"

    @property
    def levels(self) -> tuple[float, ...]:
        """What is searched, as it was asked for."""
        return self.memories or self.retentions

    def named(self, level: float) -> str:
        """A level in words."""
        return f"{level:.0%} of the bytes" if self.memories else f"{level:.0%} kept"

    @property
    def task(self) -> Task | None:
        """Whose answers the objective goes by, None where it is no task's. Raises `PluginError`."""
        if not self.objective.startswith(OF_TASK):
            return None
        params = {} if self.data is None else {"data": str(self.data)}
        return task_of(self.objective.removeprefix(OF_TASK), params)

    @property
    def goes_by_answers(self) -> bool:
        """Whether the objective is the loss of answers alone."""
        return self.objective not in ("perplexity", "mixed")

    @property
    def journal(self) -> Path | None:
        """The file that trials are written to; None where they are in memory or in a database."""
        return journal_of(self.storage)

    @property
    def losses(self) -> Path | None:
        """Where losses that profiling asks for are kept, for an estimator that asks for some; None for memory."""
        if self.journal is not None:
            return self.journal.with_suffix(".losses")
        return None if self.storage is None else self.out.with_name(self.out.name + ".losses")

    def study_name(self, level: float) -> str:
        """What the names of a level's studies begin with; a hash of the settings follows."""
        return f"{self.out.stem}-{'memory-' if self.memories else ''}{level:g}"

    @property
    def policy_study_name(self) -> str:
        """The same for the study of the policy's parameters."""
        return f"{self.out.stem}-policy"
