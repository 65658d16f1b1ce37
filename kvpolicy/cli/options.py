"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli import configuration, document
from kvpolicy.cli.document import print_json as print_json

Model = Annotated[
    str, typer.Option(help="Hub id, directory, .gguf file, or the built-in smollm2-135m.", rich_help_panel="Model")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel="Model")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Model")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel="Model")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences in one forward.", rich_help_panel="Model")]
TaskName = Annotated[
    str,
    typer.Option(help="What to measure: perplexity, or a task such as passkey, ruler/vt, longbench/trec."),
]
Question = Annotated[
    str,
    typer.Option(help="Of a task: aware compresses a context with its question, agnostic before the question comes."),
]
Data = Annotated[
    Path | None,
    typer.Option(help="The folder of a task's files; without it LongBench's are the Hub's.", show_default=False),
]
TaskFile = Annotated[
    Path | None,
    typer.Option(help='A task of your own: JSONL rows of "context", "question", "answers".', show_default=False),
]
Text = Annotated[
    Path | None, typer.Option(help="UTF-8 text file; default: Python's own language reference.", show_default=False)
]
Context = Annotated[int, typer.Option(help="Tokens of one sequence.")]
Seed = Annotated[int, typer.Option(help="Seed of the search and of the bootstrap.")]
Json = Annotated[
    bool, typer.Option("--json", callback=document.reserve, is_eager=True, help="Print JSON on standard output.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=configuration.read,
        is_eager=True,
        help="TOML or YAML file of options, such as the one beside an earlier result; the command line goes first.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Params = Annotated[
    list[str] | None,
    typer.Option("--param", help="A parameter of the estimator, NAME=JSON; repeatable.", show_default=False),
]

PolicyParams = Annotated[
    list[str] | None,
    typer.Option("--policy-param", help="A parameter of the policy, NAME=JSON; repeatable.", show_default=False),
]

AllocatorParams = Annotated[
    list[str] | None,
    typer.Option(
        "--allocator-param",
        help="A parameter of an allocator that learns, NAME=JSON; repeatable.",
        show_default=False,
    ),
]


def retentions(default: str) -> Any:
    """The --retention option of a verb; `default` says in words what happens without it."""
    text = f"Fraction that is kept; repeatable. Default: {default}."
    return typer.Option("--retention", "-r", help=text, show_default=False)


def prefills(default: str) -> Any:
    """The --prefill option of a verb; `default` says in words what comes before the policy's own default."""
    text = f"Tokens at the start that attend densely. Default: {default}none under a window rule, otherwise half."
    return typer.Option("--prefill", min=0, help=text, show_default=False)


def program() -> str:
    """What to type to start this program again, as for the next command that is suggested."""
    started, path = Path(sys.argv[0]), shutil.which("kvpolicy")
    if started.stem != "kvpolicy" or not started.exists() or (path and started.samefile(path)):
        return "kvpolicy"
    return shlex.quote(str(started))
