"""LongBench v1: questions, summaries, examples, retrieval and code over documents, from the Hub or from local files.

Source: Bai et al., arXiv:2308.14508, and its repository's `pred.py`, `metrics.py` and `eval.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from kvpolicy.errors import PluginError, TextError
from kvpolicy.model.chat_frame import token_ids
from kvpolicy.plugins.task_role import Sample, Task, Turn
from kvpolicy.tasks import metrics
from kvpolicy.tasks.family import check_member
from kvpolicy.tasks.longbench_archive import archive_rows
from kvpolicy.tasks.longbench_prompts import NAME, prompt_of
from kvpolicy.tasks.row_file import Row, data_file, drawn_rows, read_rows

_MOST = {
    **dict.fromkeys(("narrativeqa", "qasper", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "trec", "lcc", "repobench-p"), 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count", "passage_retrieval_en"), 32),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), 512),
}
_METRICS: dict[str, Callable[[str, str], float]] = {
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), metrics.rouge_l),
    **dict.fromkeys(("lcc", "repobench-p"), metrics.code_similarity),
    "passage_retrieval_en": metrics.paragraph,
    "passage_count": metrics.count,
}
_NAMES: dict[Callable[[str, str], float], str] = {
    metrics.rouge_l: "rouge_l",
    metrics.code_similarity: "code_similarity",
    metrics.f1: "f1",
}
_EXAMPLES = ("trec", "triviaqa", "samsum")  # their answers are one line
_PLAIN = (*_EXAMPLES, "lcc", "repobench-p")  # never in a chat template
_EVEN = tuple(name for name in _MOST if name not in ("narrativeqa", "musique", "qmsum"))  # LongBench-E
_CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


@dataclass(frozen=True, slots=True)
class LongBenchTask(Task):
    """An English or code task of LongBench v1; a name that ends in `_e` is of LongBench-E.

    data: a folder with `NAME.jsonl`, rows of input, context, answers and all_classes, and with `dataset2prompt.json`;
        without a folder the rows are the Hub's, and without that file the prompts are those of LongBench's repository
    """

    names: ClassVar[tuple[str, ...]] = (*_MOST, *(f"{name}_e" for name in _EVEN))
    name: str = "triviaqa"
    data: str = ""

    def __post_init__(self) -> None:
        if self.name in _CHINESE:
            raise PluginError(f"longbench/{self.name} is in Chinese, whose words kvpolicy cannot tell apart")
        check_member("longbench", self.name, self.names)

    @property
    def kind(self) -> str:
        """The task, whichever set its rows are of."""
        return self.name.removesuffix("_e")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return _NAMES.get(_METRICS.get(self.kind, metrics.f1), "accuracy") if self.kind != "trec" else "accuracy"

    @property
    def max_new_tokens(self) -> int:
        return _MOST[self.kind]

    def samples(self, tokenizer: Any, count: int, length: int, seed: int) -> Sequence[Sample]:
        whose = f"longbench/{self.name}"
        rows, prompt = self._rows(whose), prompt_of(whose, self.kind, self.data)
        last = "{input}" if self.kind == "repobench-p" else "{context}"  # there the input is code before the next line
        before, marked, behind = prompt.partition(last)
        if not marked or "{context}" not in before + marked:
            raise TextError(f"{whose}: its prompt in {NAME} has no {{context}}")
        make = partial(self._of_row, tokenizer=tokenizer, length=length, before=before + marked, behind=behind)
        return [make(row) for row in drawn_rows(rows, count, seed)]

    def score(self, answer: str, turn: Turn) -> float:
        if self.kind in _EXAMPLES:
            answer = metrics.first_line(answer)
        if self.kind == "trec":
            return max(metrics.classification(answer, truth, turn.classes) for truth in turn.answers)
        return max(_METRICS.get(self.kind, metrics.f1)(answer, truth) for truth in turn.answers)

    def _rows(self, whose: str) -> list[Row]:
        if not self.data:
            return archive_rows(whose, self.name)
        return read_rows(data_file(whose, self.data, f"{self.name}.jsonl"))

    def _of_row(self, row: Row, tokenizer: Any, length: int, before: str, behind: str) -> Sample:
        """What stands behind the context is the question. A prompt that is too long loses its middle."""
        texts = {"{input}": row.text("input"), "{context}": row.text("context")}
        question, context = (_replaced(part, texts) for part in (behind, before))
        turn = Turn(question, row.texts("answers"), "", row.texts("all_classes") if self.kind == "trec" else ())
        sample = Sample.from_text(tokenizer, context, [turn], chat=self.kind not in _PLAIN)
        while (over := sample.length - length) > 0:  # what is joined anew may have a token more: then once again
            context = _without_middle(row, tokenizer, context, question, over)
            sample = Sample.from_text(tokenizer, context, [turn], chat=self.kind not in _PLAIN)
        return sample


def _replaced(prompt: str, texts: dict[str, str]) -> str:
    """The prompt with texts for its marks, one pass for all, so that a mark inside a text stays as it is."""
    return re.sub(r"\{(?:input|context)\}", lambda mark: texts[mark[0]], prompt)


def _without_middle(row: Row, tokenizer: Any, context: str, question: str, over: int) -> str:
    """The context without `over` tokens around the middle of context and question. Raises `TextError`."""
    ids, question_ids = token_ids(tokenizer, context), token_ids(tokenizer, question)
    rest = len(ids) - over
    if rest < 1:
        raise row.refusal(f"its question alone is too long: give a context of {over - len(ids) + 1} tokens more")
    first = min((rest + len(question_ids)) // 2, rest)
    parts = (ids[:first], ids[len(ids) - rest + first :])
    return "".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
