"""The one way to a terminal: everything that the command line shows goes through here and is cleaned."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from kvpolicy.files.plain import plain

_OPTIONS = {
    "agreement": "--agreement",
    "allocator": "--allocator",
    "batch": "--batch",
    "batch_size": "--batch-size",
    "context": "--context",
    "context_length": "--context",
    "data": "--data",
    "question": "--question",
    "records": "--records",
    "device": "--device",
    "dtype": "--dtype",
    "estimator": "--estimator",
    "format": "--format",
    "gpu_memory": "--gpu-memory",
    "include_path": "--include-path",
    "layers": "--layers",
    "limit": "--limit",
    "max_loss": "--max-loss",
    "memories": "--memory",
    "memory": "--memory",
    "methods": "--methods",
    "min_tokens": "--min-tokens",
    "model": "--model",
    "new_tokens": "--new-tokens",
    "num_fewshot": "--num-fewshot",
    "objective": "--objective",
    "out": "--out",
    "param": "--param",
    "part": "--part",
    "html": "--html",
    "png": "--png",
    "policy": "--policy",
    "policy_param": "--policy-param",
    "policy_params": "--policy-param",
    "prefill": "--prefill",
    "prefill_length": "--prefill",
    "repeats": "--repeats",
    "resume": "--resume",
    "retention": "--retention",
    "sequences": "--sequences",
    "storage": "--storage",
    "task_file": "--task-file",
    "tasks": "--tasks",
    "text": "--text",
    "token_map": "--token-map",
    "tokens": "--tokens",
    "trials": "--trials",
}
"""Arguments of the library that messages speak of, and what they are called in a shell."""
_WORDS = "|".join(name for name in _OPTIONS if "_" in name)  # no English, so that they need no "="
_ARGUMENT = re.compile(rf"(?<![\w.-])(?:({'|'.join(_OPTIONS)})=(True\b)?(?=(\w?))|({_WORDS})\b)")


class Console(rich.console.Console):
    """rich's, without its markup, and with the text of all that it renders cleaned."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


def shell_line(message: str) -> str:
    """A message of the library as one line of a shell: `resume=True` is `--resume` there."""
    return plain(" ".join(_ARGUMENT.sub(_option, message).split()))


def _option(match: re.Match[str]) -> str:
    if match[4]:
        return _OPTIONS[match[4]]
    return _OPTIONS[match[1]] + (" " if match[3] and not match[2] else "")


def say(message: str) -> None:
    """A line on standard error."""
    print(f"kvpolicy: {shell_line(message)}", file=sys.stderr)


def write(text: str) -> None:
    """Text of a model on standard output, as it is where that is no terminal."""
    print(plain(text) if sys.stdout.isatty() else text, end="", flush=True)
