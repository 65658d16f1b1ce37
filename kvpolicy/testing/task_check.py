"""The laws of a task."""

from __future__ import annotations

from typing import Any

from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.testing.characters import CharacterTokenizer
from kvpolicy.testing.laws import call, hold, instance_of

_COUNT, _SEEDS = 3, (0, 1)


def check_task(task: Task | type[Task], tokenizer: Any = None, *, length: int = 4096) -> None:
    """Checks the laws of `Task`: what `samples` makes, and how `score` judges right and wrong answers.

    tokenizer: of transformers; None for a `CharacterTokenizer`
    length:    tokens of a prompt, with room for the task

    Raises `LawError`, an `AssertionError`.
    """
    instance: Task = instance_of("task", task)
    tokenizer = tokenizer or CharacterTokenizer()
    for seed in _SEEDS:
        case = f"{_COUNT} samples of {length} tokens, seed {seed}"
        samples = call(instance, "samples", case, instance.samples, tokenizer, _COUNT, length, seed)
        law = f"samples gives 1 to {_COUNT} samples"
        hold(1 <= len(samples) <= _COUNT, instance, law, case, len(samples), "return up to count")
        again = instance.samples(tokenizer, _COUNT, length, seed)
        advice = "draw from a random.Random made of the seed"
        hold(list(samples) == list(again), instance, "samples are the same for the same seed", case, "others", advice)
        for sample in samples:
            _check_sample(instance, case, sample, length)


def _check_sample(task: Task, case: str, sample: Sample, length: int) -> None:
    counts = len(sample.questions), len(sample.turns)
    law = "a sample has a context, and as many questions as turns, none of them empty"
    whole = bool(sample.context) and counts[0] == counts[1] > 0 and all(map(len, sample.questions))
    hold(whole, task, law, case, f"{len(sample.context)} tokens, {counts}", "make it with Sample.from_text")
    law = f"context and first question have at most {length} tokens"
    hold(sample.length <= length, task, law, case, sample.length, "cut the context, or refuse with a TextError")
    for turn in sample.turns:
        advice = "give Turn(question, answers) at least one answer"
        hold(bool(turn.answers), task, "every turn has an answer", case, turn, advice)
        together = " ".join(turn.answers)
        best = max(_check_score(task, f"the answer {one!r}", one, turn) for one in (together, *turn.answers))
        advice = "score(answer, turn) is 1 for what stands in turn.answers"
        hold(best > 1 - 1e-6, task, "a right answer scores 1", f"the answers {turn.answers}", best, advice)
        _check_score(task, "an empty answer", "", turn)


def _check_score(task: Task, case: str, answer: str, turn: Turn) -> float:
    score = call(task, "score", case, task.score, answer, turn)
    hold(0 <= score <= 1, task, "a score is from 0 to 1", case, score, "divide by the best that can be reached")
    return float(score)
