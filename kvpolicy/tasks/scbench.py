"""SCBench: several questions in turn about one context, which is compressed before or after the first of them.

Source: Li et al., arXiv:2412.10319. `kv`, `prefix_suffix` and `vt` are made here where no folder of its files is given.
In a file each turn is asked as it stands there, behind the model's own answers to the turns before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvpolicy.errors import PluginError, TextError
from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks.family import check_member
from kvpolicy.tasks.fitting import drawer
from kvpolicy.tasks.metrics import contained_part, contains_one, first_number
from kvpolicy.tasks.row_file import Row, data_file, drawn_rows, fitting_sample, read_rows
from kvpolicy.tasks.shared_context import key_values_sample, prefix_suffix_sample
from kvpolicy.tasks.variables import variables_sample

_VALUES = ("kv", "kv_hard", "kv_compressible", "hashhop", "prefix_suffix")
_MOST = dict.fromkeys(_VALUES, 150) | {
    "passkey": 15,
    "vt": 30,
    "many_shot": 10,
    "qa_eng": 40,
    "choice_eng": 40,
    "mf": 5,
}
_HEADS = dict.fromkeys(
    ("kv", "kv_hard", "kv_compressible"), "Find the value of each key that you are asked for.\n\n"
) | {
    "passkey": "Somewhere in this text stands a pass key. Find it and remember it.\n\n",
    "qa_eng": "Read the book and answer questions about it in a few words.\n\n",
    "choice_eng": "Read the book and answer questions about it with a letter.\n\n",
    "mf": "Read the numbers of this list.\n\n",
}
_OTHERS = ("qa_chn", "summary", "summary_with_needles", "repoqa", "repoqa_and_kv")
_LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class SCBenchTask(Task):
    """A task of SCBench.

    data:  a folder with files of SCBench, `scbench_NAME.jsonl`
    turns: questions about a context that is made here
    """

    names: ClassVar[tuple[str, ...]] = tuple(_MOST)
    name: str = "kv"
    data: str = ""
    turns: int = 5

    def __post_init__(self) -> None:
        if self.name in _OTHERS:
            raise PluginError(f"scbench/{self.name} has a metric that kvpolicy does not compute; choose another task")
        check_member("scbench", self.name, self.names)
        if self.turns < 1:
            raise PluginError(f"scbench/{self.name} with {self.turns} turns: one at least")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "contained_part" if self.name == "vt" else "accuracy"

    @property
    def max_new_tokens(self) -> int:
        return _MOST[self.name]

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        whose = f"scbench/{self.name}"
        if self.data:
            rows = read_rows(data_file(whose, self.data, f"scbench_{self.name}.jsonl"))
            return [self._of_row(row, tokenizer, length) for row in drawn_rows(rows, count, seed)]
        draws = [drawer(seed, index) for index in range(count)]
        if self.name == "vt":
            return [variables_sample(tokenizer, length, draw, chains=self.turns) for draw in draws]
        made: dict[str, Callable[..., Sample]] = {"kv": key_values_sample, "prefix_suffix": prefix_suffix_sample}
        if self.name not in made:
            raise TextError(f"{whose} reads scbench_{self.name}.jsonl: give the folder that holds it, data=DIR")
        return [made[self.name](tokenizer, length, draw, turns=self.turns) for draw in draws]

    def score(self, answer: str, turn: Turn) -> float:
        if self.name in _VALUES:
            return float(turn.answers[0] in answer)
        if self.name == "choice_eng":
            letter = re.search(rf"\b[{_LETTERS}]\b", answer)
            return float(bool(letter) and letter[0] == turn.answers[0])  # type: ignore[index]
        if self.name in ("passkey", "mf"):
            return float(first_number(answer) == turn.answers[0])
        return (contained_part if self.name == "vt" else contains_one)(answer, turn.answers)

    def _of_row(self, row: Row, tokenizer: Any, length: int) -> Sample:
        context = row.text("context" if row.has("context") else "input")
        turns = [self._turn(turn) for turn in row.objects("multi_turns")]
        return fitting_sample(row, Sample.from_text(tokenizer, _HEADS.get(self.name, "") + context, turns), length)

    def _turn(self, row: Row) -> Turn:
        question, answers = row.text("input"), row.texts("answer")
        if self.name == "qa_eng":
            return Turn(f"\n\nQuestion: {question}\nAnswer:", answers)
        if self.name != "choice_eng":
            return Turn(f"\n\n{question}", answers)
        options = row.texts("options")
        lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]
        right = answers[0] if answers[0] in _LETTERS else _LETTERS[options.index(answers[0])]
        return Turn("\n".join([f"\n\nQuestion: {question}", *lines, "The correct answer is"]), (right,), "", options)
