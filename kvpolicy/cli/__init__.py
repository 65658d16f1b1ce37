"""The command line: one file a verb. Errors are one line and exit code 2; Ctrl-C exits 130, a closed pipe 141."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import io
import os
import re
import shlex
import sys
import warnings
from importlib.metadata import version
from typing import Annotated, NoReturn, cast

import typer

from kvpolicy.cli.bench_command import bench_command
from kvpolicy.cli.compare_command import compare_command
from kvpolicy.cli.doctor_command import doctor_command
from kvpolicy.cli.estimate_command import estimate_command
from kvpolicy.cli.eval_command import eval_command
from kvpolicy.cli.generate import generate
from kvpolicy.cli.lm_eval_command import lm_eval_command
from kvpolicy.cli.plugins import plugins
from kvpolicy.cli.profile_command import profile_command
from kvpolicy.cli.share_commands import pull, push
from kvpolicy.cli.show import show
from kvpolicy.cli.terminal import say, write
from kvpolicy.cli.tune import tune_command
from kvpolicy.cli.validate_command import validate_command
from kvpolicy.cli.verb import TorchVerb, Verb
from kvpolicy.errors import AbsentModelError, KVPolicyError, first_line

app = typer.Typer(
    name="kvpolicy",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("tune", cls=TorchVerb)(tune_command)
app.command("profile", cls=TorchVerb)(profile_command)
app.command(cls=TorchVerb)(show)
app.command("validate", cls=TorchVerb)(validate_command)
app.command("eval", cls=TorchVerb)(eval_command)
app.command("compare", cls=TorchVerb)(compare_command)
app.command("lm-eval", cls=TorchVerb)(lm_eval_command)
app.command(cls=TorchVerb)(generate)
app.command("bench", cls=TorchVerb)(bench_command)
app.command(cls=TorchVerb)(push)
app.command(cls=TorchVerb)(pull)
app.command("estimate", cls=Verb)(estimate_command)
app.command(cls=Verb)(plugins)
app.command("doctor", cls=Verb)(doctor_command)


def _print_version(value: bool) -> None:
    if value:
        write(f"kvpolicy {version('kvpolicy')}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """KV-cache policies: measure which heads matter, search per-head budgets, save a plan."""


_FIRST = """\
 What to do first:

   kvpolicy doctor                   what works on this machine
   kvpolicy tune --policy snapkv     minutes: budgets of each KV head, a plan
   kvpolicy compare snapkv keydiff   minutes: who loses least at equal bytes
   kvpolicy generate uniform --policy snapkv -r 0.3 --prompt-file FILE
                                     an answer over 30 % of the cache of a text

 All with a small model on a CPU; --model takes yours.
"""

_UsageError = cast(type[Exception], typer.BadParameter.__base__)  # click's, wherever this typer keeps its click
_INTERRUPTED = 130
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")  # torch's, of GPUs and of CPUs
_BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports of `cat ... | head`


def main() -> None:
    """Entry point of the `kvpolicy` command."""
    atexit.register(gc.freeze)  # else Python looks for garbage among all of transformers' modules, for two seconds
    warnings.showwarning = _show_warning
    if sys.stdout is None:
        _fail("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        code = app(prog_name="kvpolicy", standalone_mode=False)  # typer's own error boxes are more than one line
        sys.stdout.flush()
    except _UsageError as error:
        if len(sys.argv) == 1:
            error.show()  # type: ignore[attr-defined]  # the help
            sys.stderr.write(f"{_FIRST}\n")
            sys.exit(2)
        _fail(f"{error.format_message().rstrip('.')}; see --help")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except (Exception, SystemExit) as error:
        if _is_broken_pipe(error):
            _drop_output()
            sys.exit(_BROKEN_PIPE)
        if (message := _message(error)) is None:
            raise
        _fail(message)
    if code == _INTERRUPTED:
        _say("interrupted")
    sys.exit(code or 0)


def _message(error: BaseException) -> str | None:
    """The line for a failure that is not ours; None for a bug, which is to be seen with its traceback.

    What libraries raise over somebody's file is a `KVPolicyError` by now (`kvpolicy.errors.foreign`).
    """
    if isinstance(error, AbsentModelError):
        return error.message(shlex.join(["kvpolicy", *sys.argv[1:], "--model", error.name]))
    if isinstance(error, KVPolicyError):
        return str(error)
    if isinstance(error, OSError):
        where = error.filename
        if where is None and error.errno in _CANNOT_WRITE:  # our files are `kvpolicy.files.regular`', which names them
            where = "standard output"
            _drop_output()
        return first_line(error) if where is None else f"{where}: {error.strerror}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return f"not enough memory: {first_line(error)}; a shorter context or a smaller batch needs less"
    return None


def _is_broken_pipe(error: BaseException) -> bool:
    """Whether nobody reads standard output any more, as in `kvpolicy ... | head`. rich turns that into an exit."""
    return isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError)


def _drop_output() -> None:
    """Gives up what still waits for standard output: Python would try again at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> NoReturn:
    _say(f"error: {message}")
    sys.exit(2)


def _say(message: str) -> None:
    """One line, whatever a library put into the message."""
    with contextlib.suppress(OSError):  # where standard error cannot be written either
        say(message)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line, without the path of our own source."""
    _say(f"warning: {message}")
