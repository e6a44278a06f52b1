"""The command line: one application, a file of ``kvpolicy.commands`` for each of its commands."""

from __future__ import annotations

import errno
import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvpolicy.commands.ablate import ablate
from kvpolicy.commands.bench import bench
from kvpolicy.commands.build_kernel import build_kernel
from kvpolicy.commands.calibrate import calibrate
from kvpolicy.commands.check import check
from kvpolicy.commands.console import UNREAD, drop_output, say_error
from kvpolicy.commands.demo import demo
from kvpolicy.commands.draw import draw
from kvpolicy.commands.list_policies import list_policies
from kvpolicy.commands.offsets import offsets
from kvpolicy.commands.report import report
from kvpolicy.commands.reproduce import reproduce
from kvpolicy.commands.score import score
from kvpolicy.commands.tune import tune
from kvpolicy.errors import KVPolicyError

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Tells a command whose output nobody reads from one that has failed."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; click itself would end with status 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            drop_output()
            raise SystemExit(UNREAD) from None


app = typer.Typer(
    name="kvpolicy",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpolicy {version('kvpolicy')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """KV-cache eviction policies: try them, compare them, look at what they keep."""


app.command("list")(list_policies)
app.command("demo")(demo)
app.command("draw")(draw)
app.command("bench")(bench)
app.command("build-kernel")(build_kernel)
app.command("ablate")(ablate)
app.command("check")(check)
app.command("report")(report)
app.command("reproduce")(reproduce)
app.command("score")(score)
app.command("tune")(tune)
app.command("calibrate")(calibrate)
app.command("offsets")(offsets)


def main() -> None:
    """Run the command line; errors of the user's are one line, not a traceback.

    Exit status 2: what was asked for can't be; 74: a file can't be read or written; 1: something
    that was measured or checked has failed; 130: Ctrl-C; 141: nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal in ASCII is no reason to end
            stream.reconfigure(errors="replace")
    try:
        app()
    except KVPolicyError as error:
        say_error(str(error))
        of_files = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        raise SystemExit(74 if of_files else 2) from None
    except OSError as error:
        about = error.filename
        if about is None:  # what is written by its name says it: only the output has none
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            about = "the output can't be written"
        say_error(f"{about}: {error.strerror}")
        raise SystemExit(74) from None
