"""BABILong: facts of a small world that stand between the sentences of books, and questions about them.

Source: Kuratov et al., arXiv:2406.10149; the metric is that of its repository. The wording around the rows is our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks.family import check_member
from kvpolicy.tasks.metrics import only_label
from kvpolicy.tasks.row_file import Row, data_file, drawn_rows, fitting_sample, read_rows

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_PEOPLE = ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")
_HEADS = {
    "qa1": "where people are. Where somebody moved, the last place counts. For example: Tom went to the cellar. Ann "
    "went to the shop. Tom moved to the barn. Where is Tom? Answer: barn",
    "qa2": "people, places and things. A thing is where its bearer goes, and stays where it is put down. For example: "
    "Tom took the hat. Tom went to the barn. Where is the hat? Answer: barn",
    "qa3": "people, places and things. A thing is where its bearer goes. For example: Tom took the hat. Tom went to "
    "the barn. Tom went to the shop. Where was the hat before the shop? Answer: barn",
    "qa4": "where places lie. For example: The barn is north of the shop. What is north of the shop? Answer: barn",
    "qa5": "people who give things to each other. For example: Tom took the hat. Tom gave the hat to Ann. Who received "
    "the hat? Answer: Ann",
}


@dataclass(frozen=True, slots=True)
class BABILongTask(Task):
    """One of the first five tasks of BABILong; `qa1_4k` reads the rows of 4k tokens.

    data: a folder with `NAME.jsonl`, rows of input, question and target
    """

    names: ClassVar[tuple[str, ...]] = tuple(_HEADS)
    name: str = "qa1"
    data: str = ""

    def __post_init__(self) -> None:
        check_member("babilong", self.kind, self.names)

    @property
    def kind(self) -> str:
        """The task, whatever its rows' length."""
        return re.sub(r"_\d+k$", "", self.name)

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "accuracy"

    @property
    def max_new_tokens(self) -> int:
        return 20

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        rows = read_rows(data_file(f"babilong/{self.name}", self.data, f"{self.name}.jsonl"))
        return [self._of_row(row, tokenizer, length) for row in drawn_rows(rows, count, seed)]

    def score(self, answer: str, turn: Turn) -> float:
        return only_label(answer, turn.answers[0], turn.classes, turn.question)

    def _of_row(self, row: Row, tokenizer: Any, length: int) -> Sample:
        head = f"The text below hides facts about {_HEADS[self.kind]}.\n\n"
        classes = _PEOPLE if self.kind == "qa5" else _PLACES
        question = f"\n\nQuestion: {row.text('question').strip()} Give one word."
        turn = Turn(question, row.texts("target"), "\nAnswer:", classes)
        return fitting_sample(row, Sample.from_text(tokenizer, head + row.text("input"), [turn]), length)
