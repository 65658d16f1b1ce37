"""The command line: one file a verb. Errors are one line and exit code 2; Ctrl-C exits 130."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn, cast

import typer

from kvpolicy.cli.bench import bench
from kvpolicy.cli.compare import compare_command
from kvpolicy.cli.estimate import estimate
from kvpolicy.cli.evaluate import evaluate
from kvpolicy.cli.generate import generate
from kvpolicy.cli.plugins import plugins
from kvpolicy.cli.profile import profile
from kvpolicy.cli.show import show
from kvpolicy.cli.tune import tune_command
from kvpolicy.errors import KVPolicyError

app = typer.Typer(
    name="kvpolicy",
    help="KV-cache policies: measure which heads matter, search per-head budgets, save a plan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("tune")(tune_command)
app.command()(profile)
app.command()(show)
app.command("eval")(evaluate)
app.command("compare")(compare_command)
app.command()(generate)
app.command()(bench)
app.command()(estimate)
app.command()(plugins)


_UsageError = cast(type[Exception], typer.BadParameter.__base__)  # click's, wherever this typer keeps its click
_INTERRUPTED = 130


def main() -> None:
    """Entry point of the `kvpolicy` command."""
    warnings.showwarning = _show_warning
    try:
        code = app(prog_name="kvpolicy", standalone_mode=False)  # typer's own error boxes are more than one line
    except KVPolicyError as error:
        _fail(str(error))
    except _UsageError as error:
        if len(sys.argv) == 1:
            error.show()  # type: ignore[attr-defined]  # the help
            sys.exit(2)
        _fail(f"{error.format_message().rstrip('.')}; see --help")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:  # `kvpolicy ... | head`
        sys.stderr.close()
        sys.exit(141)
    if code == _INTERRUPTED:
        _say("interrupted")
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    _say(f"error: {message}")
    sys.exit(2)


def _say(message: str) -> None:
    """One line, whatever a library put into the message."""
    print(f"kvpolicy: {' '.join(message.split())}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line, without the path of our own source."""
    _say(f"warning: {message}")
