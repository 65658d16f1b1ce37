"""A user's own questions: a JSONL file of `{"context": ..., "question": ..., "answers": [...]}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import TextError
from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks.metrics import f1
from kvpolicy.tasks.row_file import Row, drawn_rows, fitting_sample, read_rows


@dataclass(frozen=True, slots=True)
class FileTask(Task):
    """Questions of a file.

    data: the file
    max_new_tokens: of an answer
    """

    data: str = ""
    max_new_tokens: int = 64

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "f1"

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        if not self.data:
            raise TextError("no file of questions was named: give one, task_file=FILE")
        return [self._of_row(row, tokenizer, length) for row in drawn_rows(read_rows(self.data), count, seed)]

    def score(self, answer: str, turn: Turn) -> float:
        return max(f1(answer, truth) for truth in turn.answers)

    @staticmethod
    def _of_row(row: Row, tokenizer: Any, length: int) -> Sample:
        turn = Turn(f"\n\nQuestion: {row.text('question')}\nAnswer:", row.texts("answers"))
        return fitting_sample(row, Sample.from_text(tokenizer, row.text("context"), [turn]), length)
