"""``kvpolicy demo``: the main job, in two minutes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvpolicy.commands.console import console
from kvpolicy.lab.run import demo as lab
from kvpolicy.lab.run.subject import ImageSubject, load_subject

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table and the pictures.")] = Path(
        "runs/demo"
    ),
    images: Annotated[int, typer.Option(min=10, help="Images to draw with each policy.")] = 200,
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    policies: Annotated[
        str, typer.Option(help="Policies, separated by commas; full is always there.")
    ] = ",".join(lab.POLICIES),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    scored: Annotated[int, typer.Option(min=2, max=1000, help="Real images to score.")] = 256,
) -> None:
    """Draw images with each policy from a fraction of the cache, and measure what it costs.

    The model is fashion-ar, trained on real photographs, and ships with kvpolicy. Writes
    results.json, images.png and retention.png.
    """
    from kvpolicy.lab.show.pictures import contact_sheet, retention_sheet

    subject = cast(ImageSubject, load_subject("fashion-ar"))
    settings = lab.plan([name.strip() for name in policies.split(",")], budget, subject)
    out.mkdir(parents=True, exist_ok=True)
    line, total = subject.layout.line_length, subject.layout.length - subject.layout.prefix
    moments = tuple(round(subject.layout.rows * share) * line for share in (0.5, 0.75, 1.0))
    results: list[lab.Result] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=None),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for setting in settings:
            name = setting.policy.label
            scoring = progress.add_task(f"{name}: score", total=scored)
            drawing = progress.add_task(f"{name}: draw", total=subject.batch_tokens(images))
            result = lab.run(
                setting,
                subject,
                images=images,
                scored=scored,
                seed=seed,
                moments=moments,
                full=results[0] if results else None,
                on_score=partial(progress.advance, scoring),
                on_generate=partial(progress.advance, drawing),
            )
            results.append(result)
            lab.write_rows([done.row for done in results], out / "results.json")
    console.print(_table(results, images, scored, budget))
    classes = len(subject.class_names)
    sheet = contact_sheet(
        [(r.row.policy, _remark(r.row), r.generated.images[:classes]) for r in results],
        subject.class_names,
        f"Drawn from {budget} of the cache (top row: all of it), same seed down each column",
    )
    sheet.savefig(out / "images.png", dpi=200)
    image, _ = subject.retention(settings[0], moments[:1])
    sheet = retention_sheet(
        image,
        [(r.row.policy, _remark(r.row), r.retention) for r in results[1:] or results],
        moments,
        f"Tokens still cached at a budget of {budget} ({total} image tokens)",
    )
    sheet.savefig(out / "retention.png", dpi=200)
    for name in ("results.json", "images.png", "retention.png"):
        console.print(f"wrote {out / name}")


def _remark(row: lab.Row) -> str:
    return "full cache" if row.policy == "full" else f"{row.delta_bits:+.3f} bits/pixel"


def _table(results: list[lab.Result], images: int, scored: int, budget: str) -> Table:
    """The figures, narrow enough for 80 columns."""
    table = Table(
        title=f"cache of {budget} of the image: {scored} real images scored, {images} images drawn",
        caption="peak: cached tokens a head, prefix included, mean over layers; MB: cache of one "
        "image; bits/px: of real test images under that cache, lower is better; difference: to "
        "full on the same images, with its 95% interval; Fréchet: distance of the drawn images to "
        "real ones, lower is better; class: drawn images that a classifier recognises.",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_style="bold",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("peak", "MB", "bits/px", "difference to full", "Fréchet", "class", "img/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        row = result.row
        table.add_row(
            row.policy,
            f"{row.peak_tokens:g}",
            f"{row.cache_bytes / 1e6:.2f}",
            f"{row.bits_per_pixel:.4f}",
            "-"
            if row.policy == "full"
            else f"{row.delta_bits:+.4f} ({row.delta_low:+.3f}…{row.delta_high:+.3f})",
            f"{row.frechet:.2f}",
            f"{row.class_accuracy:.0%}",
            f"{row.images_per_second:.1f}",
        )
    return table
