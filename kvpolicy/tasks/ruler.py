"""RULER: 13 tasks of retrieval, tracking and counting.

Source: Hsieh et al., arXiv:2404.06654. Six tasks are made here by its rules, at exact lengths, with words and wording
of our own: their figures compare methods, and are no RULER scores. Files that RULER's own scripts wrote are read as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from kvpolicy.errors import TextError
from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks.family import check_member
from kvpolicy.tasks.fitting import drawer
from kvpolicy.tasks.metrics import contained_part, contains_one
from kvpolicy.tasks.needle_lines import NEEDLES, needle_sample
from kvpolicy.tasks.row_file import Row, data_file, drawn_rows, fitting_sample, read_rows
from kvpolicy.tasks.variables import variables_sample
from kvpolicy.tasks.word_lists import common_words_sample, frequent_words_sample

_GENERATED: dict[str, Callable[..., Sample]] = {
    **{name: partial(needle_sample, kind) for name, kind in NEEDLES.items()},
    "vt": variables_sample,
    "cwe": common_words_sample,
    "fwe": frequent_words_sample,
}
_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
_DOCUMENTS = ("qa_1", "qa_2")
_MOST = {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(_DOCUMENTS, 32)


@dataclass(frozen=True, slots=True)
class RulerTask(Task):
    """A task of RULER.

    data: a folder with files of RULER's scripts, `NAME.jsonl` or `NAME/validation.jsonl`: rows of input, outputs and
        answer_prefix. Needed for haystacks of essays and for questions about documents.
    """

    names: ClassVar[tuple[str, ...]] = (*sorted({*_GENERATED, *_ESSAYS}), *_DOCUMENTS)
    name: str = "niah_single_1"
    data: str = ""

    def __post_init__(self) -> None:
        check_member("ruler", self.name, self.names)

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "contains_one" if self.name in _DOCUMENTS else "contained_part"

    @property
    def max_new_tokens(self) -> int:
        return _MOST.get(self.name, 128)

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        if self.data:
            return [self._of_row(row, tokenizer, length) for row in drawn_rows(self._rows(), count, seed)]
        if self.name not in _GENERATED:
            raise TextError(
                f"ruler/{self.name} takes {'documents' if self.name in _DOCUMENTS else 'essays'} that are not part of "
                f"kvpolicy: write {self.name}.jsonl with RULER's scripts and give its folder, data=DIR"
            )
        make = _GENERATED[self.name]
        return [make(tokenizer, length, drawer(seed, index)) for index in range(count)]

    def score(self, answer: str, turn: Turn) -> float:
        return (contains_one if self.name in _DOCUMENTS else contained_part)(answer, turn.answers)

    def _rows(self) -> list[Row]:
        try:
            path = data_file(f"ruler/{self.name}", self.data, f"{self.name}.jsonl")
        except TextError:
            path = data_file(f"ruler/{self.name}", self.data, f"{self.name}/validation.jsonl")
        return read_rows(path)

    def _of_row(self, row: Row, tokenizer: Any, length: int) -> Sample:
        """The last line of an input is its question. Raises `TextError` for one that is longer than `length`."""
        context, line, question = row.text("input").rpartition("\n")
        prefix = row.text("answer_prefix") if row.has("answer_prefix") else ""
        turn = Turn(line + question, row.texts("outputs"), prefix)
        return fitting_sample(row, Sample.from_text(tokenizer, context, [turn]), length)
