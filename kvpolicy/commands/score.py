"""``kvpolicy score``: figures of folders of drawn images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvpolicy.commands.console import console
from kvpolicy.commands.sweep import note
from kvpolicy.errors import ParameterError

__all__ = ["score"]

_ROWS = (
    ("fid", "FID", 2),
    ("inception_score", "inception score", 2),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
    ("clip_score", "CLIP score", 2),
)


def score(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Of pictures, as kvpolicy draw makes them or not; or samples.npz."),
    ],
    real: Annotated[
        Path | None,
        typer.Option(help="Real pictures: a folder, or an .npz of them or of their statistics."),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(help="The network of FID: weights-inception-2015-12-05-6726825d.pth."),
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP, for folders that were drawn of prompts.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; scores.json in the first folder if none.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
) -> None:
    """Compute FID, inception score, precision, recall and CLIP score of folders of pictures.

    Networks are read from local files; nothing is downloaded.
    """
    from kvpolicy.lab.score.score import load_networks
    from kvpolicy.lab.score.score import score as lab

    if out is None:
        if folders[0].suffix == ".npz":
            raise ParameterError(f"{folders[0]} is no folder; say where to write with --out")
        out = folders[0] / "scores.json"
    networks = load_networks(inception, clip, device)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tasks: dict[Path, Any] = {}

    def tell(count: int, total: int, source: Path) -> None:
        if source not in tasks or bar.tasks[tasks[source]].finished:
            tasks[source] = bar.add_task(str(source), total=total)
        bar.advance(tasks[source], count)

    with bar:
        found = lab(folders, networks, tell, real=real, out=out, batch=batch)
    console.print(_table(found))
    for text in found.notes:
        note(f"note: {text}")
    note(f"wrote {out}")


def _table(scores: Any) -> Table:
    """A column a folder, a row a figure."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column("", no_wrap=True)
    for folder in scores.folders:
        shown.add_column(folder, overflow="fold")
    every = list(scores.folders.values())
    shown.add_row("images", *(f"{figures.images:,}" for figures in every))
    for name, label, digits in _ROWS:
        if any(getattr(figures, name) is not None for figures in every):
            cells = (_spell(figures, name, digits) for figures in every)
            shown.add_row(label, *cells)
    return shown


def _spell(figures: Any, name: str, digits: int) -> str:
    figure = getattr(figures, name)
    if figure is None:
        return ""
    text = f"{figure.value:.{digits}f}"
    if name == "inception_score":
        return f"{text} ± {figures.inception_deviation:.{digits}f}"
    if figure.low is None:
        return text
    return f"{text} ({figure.low:.{digits}f}…{figure.high:.{digits}f})"
