"""``kvpolicy demo``: the main job, in two minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvpolicy.commands.arguments import STALE, find_own, split, stale_from
from kvpolicy.commands.console import console
from kvpolicy.commands.progress import Bar
from kvpolicy.commands.sweep import say_failures, sweep
from kvpolicy.lab.run import demo as lab

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the table and the pictures; made, or gone on with.")
    ] = Path("runs/demo"),
    images: Annotated[int, typer.Option(min=10, help="Images to draw with each policy.")] = 200,
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    policies: Annotated[
        str, typer.Option(help="Policies, separated by commas; full is always there.")
    ] = ",".join(lab.POLICIES),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    scored: Annotated[int, typer.Option(min=2, max=1000, help="Real images to score.")] = 256,
    stale: Annotated[bool | None, typer.Option("--stale/--keep-stale", help=STALE)] = None,
) -> None:
    """Draw images with each policy from a fraction of the cache, and measure what it costs.

    The model is fashion-ar, trained on real photographs, and ships with kvpolicy. A policy has a
    process and a thread of its own, as many at a time as there are processors. Writes results.json,
    images.png and retention.png; the folder is a run's, which kvpolicy report reads, and the same
    command goes on where one was interrupted.
    """
    from kvpolicy.lab.compare.comparison import compare
    from kvpolicy.lab.compare.comparison_file import write_comparison
    from kvpolicy.lab.run.executors import Processes, processors
    from kvpolicy.lab.run.outputs import image_sheets, retention_sheets
    from kvpolicy.lab.run.runner import prepare, writing

    plan = lab.plan(split(policies), budget, images=images, scored=scored, seed=seed)
    find_own(*(policy.name for policy in plan.policies))
    prepared = prepare(plan)
    workers = Processes(min(processors(), len(prepared.cells)))
    main = prepared.metrics[0]
    progress = Bar(main, workers.workers, console)
    folder = sweep(prepared, out, workers, 1, progress, stale_from(stale))
    entries = compare(list(folder.finished()), prepared.metrics)
    if not entries:
        say_failures(progress, out)
    rows = lab.rows(entries)
    sheets = image_sheets(entries, folder.subject.class_names, main)
    with writing(out):
        write_comparison(out, entries)
        lab.write_rows(rows, out / "results.json")
        written = [out / "results.json"]
        for name, figures in (("images", sheets), ("retention", retention_sheets(entries, main))):
            for figure in figures.values():  # one: there is one budget
                figure.savefig(out / f"{name}.png", dpi=200)
                written.append(out / f"{name}.png")
    console.print(_table(rows, images, scored, budget))
    for file in written:
        console.print(f"wrote {file}", markup=False, highlight=False)
    say_failures(progress, out)


def _table(rows: Sequence[lab.Row], images: int, scored: int, budget: str) -> Table:
    """The figures, narrow enough for 80 columns."""
    table = Table(
        title=f"cache of {budget} of the image: {scored} real images scored, {images} images drawn",
        caption="peak: cached tokens a head, prefix included, mean over layers; MB: cache of one "
        "image; bits/px: of real test images under that cache, lower is better; difference: to "
        "full on the same images, with its 95% interval; Fréchet: distance of the drawn images to "
        "real ones, lower is better; class: drawn images that a classifier recognises; img/s: "
        "drawn by one thread.",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_style="bold",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("peak", "MB", "bits/px", "difference to full", "Fréchet", "class", "img/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.policy,
            f"{row.peak_tokens:g}",
            f"{row.cache_bytes / 1e6:.2f}",
            f"{row.bits_per_pixel:.4f}",
            "-"
            if row.policy == "full" or row.delta_bits is None
            else f"{row.delta_bits:+.4f} ({row.delta_low:+.3f}…{row.delta_high:+.3f})",
            f"{row.frechet:.2f}",
            f"{row.class_accuracy:.0%}",
            f"{row.images_per_second:.1f}",
        )
    return table
