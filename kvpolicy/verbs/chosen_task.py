"""The task that a verb was asked for, and its samples for one model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy.errors import KVPolicyError, PluginError
from kvpolicy.plugins import plugin_call
from kvpolicy.progress import Progress
from kvpolicy.tasks.family import families, task_of
from kvpolicy.tasks.question_time import QuestionTime, check_question
from kvpolicy.verbs import arguments

if TYPE_CHECKING:
    from kvpolicy.comparison.answers import AnswerTask
    from kvpolicy.plugins.task_role import Task

PERPLEXITY = "perplexity"
_VERSIONS = ("kvpolicy", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class ChosenTask:
    """A registered task before a model is loaded.

    name:     as it was asked for
    question: when the first question comes
    """

    name: str
    role: Task
    question: QuestionTime

    def of_model(
        self,
        model: Any,
        tokenizer: Any,
        *,
        limit: int,
        context: int,
        seed: int,
        records: Path | None = None,
        settings: dict[str, Any] | None = None,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> AnswerTask:
        """Its samples for a model. Raises `TextError` for a length without room and for files, `PluginError`."""
        from kvpolicy.comparison.answers import AnswerTask

        samples = plugin_call.task_samples(self.role, tokenizer, limit, context, seed)
        options: dict[str, Any] = {"question": self.question, "records": records, "settings": settings}
        options |= {"batch_size": batch_size, "progress": progress, "facts": {"seed": seed, "versions": versions()}}
        return AnswerTask(self.name, self.role, model, tokenizer, samples, **options)


def chosen_task(
    name: str, *, question: str = "aware", data: str | Path | None = None, task_file: str | Path | None = None
) -> ChosenTask | None:
    """The registered task of a name; None for perplexity. task_file: a file of questions, in place of a name

    Raises `PluginError` for a name that is none, `KVPolicyError` for arguments that do not go together.
    """
    when = check_question(question)
    if task_file is not None:
        if name not in (PERPLEXITY, "file"):
            raise KVPolicyError(f"task_file= is a task of its own: leave task={name} out")
        if data is not None:
            raise KVPolicyError("task_file= is the file itself: leave data= out")
        arguments.check_text(Path(task_file))
        return ChosenTask("file", task_of("file", {"data": str(task_file)}), when)
    if name == PERPLEXITY:
        if data is not None or when != "aware":
            raise KVPolicyError("data= and question= go with a task whose prompts have questions, not with perplexity")
        return None
    try:
        return ChosenTask(name, task_of(name, {} if data is None else {"data": str(data)}), when)
    except PluginError as error:
        if str(error).startswith("there is no task"):
            raise PluginError(f"no task named '{name}'; there is: {PERPLEXITY}, {', '.join(families())}") from None
        raise


def versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS}
