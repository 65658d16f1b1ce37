"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvpolicy.cli import document
from kvpolicy.cli.document import print_json as print_json
from kvpolicy.errors import BudgetError, KVPolicyError, ModelError, PluginError, TextError, foreign

Model = Annotated[
    str, typer.Option(help="Hub id, directory, .gguf file, or the built-in smollm2-135m.", rich_help_panel="Model")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel="Model")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Model")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel="Model")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences in one forward.", rich_help_panel="Model")]
Text = Annotated[
    Path | None, typer.Option(help="UTF-8 text file; default: Python's own language reference.", show_default=False)
]
Context = Annotated[int, typer.Option(help="Tokens of one sequence.")]
Seed = Annotated[int, typer.Option(help="Of the search and of the bootstrap.")]
Json = Annotated[
    bool, typer.Option("--json", callback=document.reserve, is_eager=True, help="Print JSON on standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Params = Annotated[
    list[str] | None,
    typer.Option("--param", help="A parameter of the estimator, NAME=JSON; several times.", show_default=False),
]

PolicyParams = Annotated[
    list[str] | None,
    typer.Option("--policy-param", help="A parameter of the policy, NAME=JSON; several times.", show_default=False),
]

AllocatorParams = Annotated[
    list[str] | None,
    typer.Option(
        "--allocator-param",
        help="A parameter of an allocator that learns, NAME=JSON; several times.",
        show_default=False,
    ),
]


def retentions(default: str) -> Any:
    """The --retention option of a verb; `default` says in words what happens without it."""
    told = f"Kept fraction; give it several times. Default: {default}."
    return typer.Option("--retention", "-r", help=told, show_default=False)


def prefills(default: str) -> Any:
    """The --prefill option of a verb; `default` says in words what comes before the policy's own default."""
    told = f"Tokens at the start that attend densely. Default: {default}none under a window rule, else half."
    return typer.Option("--prefill", min=0, help=told, show_default=False)


DEFAULT_CONTEXT = 1024
LEAST_CONTEXT = 16
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(name: str) -> str:
    """The name itself; "auto" is a CUDA device if there is one. Raises `ModelError` if it does not exist."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"no device is called '{name}'; try cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"the device '{name}' was asked for, but PyTorch finds no CUDA device here; use --device cpu")
    with foreign(f"the device '{name}' cannot be used", ModelError):
        torch.zeros(1, device=device).item()  # meta holds no numbers, and not every GPU that is named is there
    return name


def pick_dtype(name: str, device: str) -> str:
    """The name itself; "auto" is bfloat16 on a GPU and float32 on the CPU. Raises `ModelError` for any other."""
    if name not in _DTYPES:
        raise ModelError(f"--dtype must be auto, float32, bfloat16 or float16, got '{name}'")
    if name != "auto":
        return name
    return "float32" if device == "cpu" else "bfloat16"


def check_retention(retention: float) -> float:
    if not 0 < retention <= 1:
        raise BudgetError(f"--retention is the fraction that is kept, in (0, 1]; got {retention:g}")
    return retention


def check_context(length: int) -> int:
    if length < LEAST_CONTEXT:
        raise BudgetError(f"--context must be at least {LEAST_CONTEXT} tokens, got {length}")
    return length


def check_text(path: Path | None) -> None:
    """Fails before a model is loaded. Raises `TextError` for a file that is not there or cannot be read."""
    if path is None:
        return
    code = errno.ENOENT if not path.exists() else errno.EISDIR if path.is_dir() else errno.EACCES
    if code != errno.EACCES or not os.access(path, os.R_OK):
        raise TextError(f"cannot read the text {path}: {os.strerror(code)}")


def check_writable(path: Path) -> None:
    """Fails before the work, not after it. Raises `KVPolicyError`."""
    folder = path.resolve().parent
    if path.is_dir():
        raise KVPolicyError(f"cannot write {path}: it is a directory")
    if not folder.is_dir():
        raise KVPolicyError(f"cannot write {path}: there is no directory {folder}")
    if path.exists() and not path.is_file():
        raise KVPolicyError(f"cannot write {path}: it is no regular file")  # a device would be replaced by a file
    probe = folder / f".{path.name}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise KVPolicyError(f"cannot write {path}: {error.strerror}") from error


def program() -> str:
    """What to type to start this program again, as for the next command that is suggested."""
    started, found = Path(sys.argv[0]), shutil.which("kvpolicy")
    if started.stem != "kvpolicy" or not started.exists() or (found and started.samefile(found)):
        return "kvpolicy"
    return shlex.quote(str(started))


def parse_params(pairs: list[str] | None, option: str = "--param") -> dict[str, Any]:
    """NAME=JSON pairs; a value that is no JSON is taken as text. Raises `PluginError` for a pair without '='."""
    params = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise PluginError(f"{option} expects NAME=VALUE, got '{pair}'")
        try:
            params[name] = json.loads(value)
        except RecursionError:
            raise PluginError(f"{option} {name}: nested too deeply for a parameter") from None
        except ValueError:
            params[name] = value
    return params
