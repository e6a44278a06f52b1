"""Running a plan from the command line: how it goes, what ended it, and what failed."""

from __future__ import annotations

from pathlib import Path

import typer

from kvpolicy.commands.console import UNREAD, console, drop_output
from kvpolicy.commands.progress import SweepProgress
from kvpolicy.lab.run.executor import Executor
from kvpolicy.lab.run.run_folder import RunFolder
from kvpolicy.lab.run.runner import Prepared, Stale, run

__all__ = ["note", "say_failures", "sweep"]


def sweep(
    prepared: Prepared,
    out: Path,
    executor: Executor,
    threads: int,
    progress: SweepProgress,
    stale: Stale,
) -> RunFolder:
    """Measure what has not finished; what ends the command loses nothing that has.

    Raises:
        SystemExit: 130, after Ctrl-C; 141, where nobody reads the output any more.
    """
    for item in prepared.left_out:
        note(f"left out: {item.label} at {item.budget}: {item.reason}")
    try:
        with progress:
            return run(prepared, out, executor, threads, progress, stale)
    except KeyboardInterrupt:
        note(f"stopped: {_safe(progress, out)}")
        raise SystemExit(130) from None
    except BrokenPipeError:
        drop_output()
        typer.echo(f"stopped, as nobody reads the output: {_safe(progress, out)}", err=True)
        raise SystemExit(UNREAD) from None


def _safe(progress: SweepProgress, out: Path) -> str:
    return (
        f"{progress.count} of {progress.total} cells are finished and safe in {out}; "
        f"the same command goes on from there"
    )


def say_failures(progress: SweepProgress, out: Path) -> None:
    """Name what has failed, once what has not failed is shown.

    Raises:
        SystemExit: 1, where anything has.
    """
    for failure in progress.failures:
        where = out / "failures" / f"{failure.id}.json"
        note(f"failed: {failure.cell.label}: {failure.error} (traceback: {where})")
    if progress.failures:
        note("the same command tries failed cells again")
        raise SystemExit(1)


def note(text: str) -> None:
    """For people: never among the lines that programs read."""
    typer.echo(text, err=not console.is_terminal)
