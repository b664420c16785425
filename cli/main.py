"""The `lorazip` command: its verbs, and the one place where exceptions become exit codes."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from lorazip_core import __version__
from lorazip_core.base.errors import Interrupted, UsageError
from lorazip_core.base.stopping import stop_requested

from . import console
from .add import add
from .calibrate import calibrate
from .cluster import cluster
from .compress import compress
from .demo import demo
from .exit_codes import BUG
from .export import export
from .failures import explain
from .fetch import fetch
from .help import Program, Verb
from .info import info
from .interrupt import INTERRUPTED, TOLD, interruptible
from .remove import remove
from .serve import serve
from .verify import verify

app = typer.Typer(
    cls=Program,
    rich_markup_mode=None,  # Rich's help carries ANSI in CI
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (fetch, cluster, compress, add, remove, verify, export, info, serve, calibrate, demo):
    app.command(cls=Verb)(verb)


_COMPLETE = "_LORAZIP_COMPLETE"  # set by the shells' scripts of --show-completion, to ask for completions


def _print_version(wanted: bool) -> None:
    if wanted:
        console.line(f"lorazip {__version__}")
        raise typer.Exit()


@app.callback()
def lorazip(
    version: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Compress a collection of LoRA adapters into one shared-basis bundle, prove the loss, and export them again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. No exception leaves it; every failure is a line on stderr."""
    arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if "" in arguments:  # as a path it would mean the current directory
        console.error("an argument is empty: is a variable not set?")
        return UsageError.exit_code
    with interruptible():
        try:
            return _run(arguments)
        except Interrupted as interruption:
            return _interrupted(str(interruption))
        except KeyboardInterrupt:
            return _interrupted()


def _run(arguments: list[str]) -> int:
    """Run one command. Only an interruption leaves it as an exception."""
    try:
        code = _invoke(arguments)
        console.flush()
        return code
    except SystemExit as stop:  # how Typer ends --show-completion and --install-completion
        console.flush()
        return int(stop.code or 0)
    except Exception as error:
        if os.environ.get("LORAZIP_DEBUG"):
            traceback.print_exc()
        if stop_requested():
            return _interrupted()
        with suppress(OSError):  # else Python would try again at its end, and fail with a code of its own
            console.flush()
        failure = explain(error, arguments)
        if failure is None:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            console.error(f"a bug in lorazip: {what} (set LORAZIP_DEBUG=1 for the traceback, and report it)")
            return BUG
        for text in failure.lines:
            console.error(text)
        return failure.exit_code


def _invoke(arguments: list[str]) -> int:
    """Run the command that the arguments name; its exit code."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("lorazip", arguments) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as stop:
        return stop.exit_code


def _interrupted(told: str = TOLD) -> int:
    console.error(told)
    return INTERRUPTED


def run() -> None:
    """The command of the command line, as the whole process."""
    if sys.stdout is None or sys.stderr is None:  # closed by the parent (>&-)
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without "é" is no reason to fail
    if _COMPLETE in os.environ:
        app(prog_name="lorazip")
    code = main()
    if code == INTERRUPTED:
        # At once: Python would take a second to unload torch, and may end by the signal where it once was lost.
        os._exit(code)
    sys.exit(code)
