"""``kvpolicy report``: a run, or a trace, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    path: Annotated[Path, typer.Argument(help="An ablation's folder, or a trace's file.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; report.html beside what is reported on.")
    ] = None,
) -> None:
    """Write one HTML file with a run's table, plots, pictures and decisions.

    It needs no network and opens from disk. Making it runs nothing that the folder names.
    """
    from kvpolicy.lab.run.run_folder import open_run
    from kvpolicy.lab.show.report import report_on_run, report_on_trace

    if path.is_file():
        out = path.with_suffix(".html") if out is None else out
        report_on_trace(path, out)
    else:
        out = path / "report.html" if out is None else out
        report_on_run(open_run(path), out)
    typer.echo(f"wrote {out}")
