"""``kvpolicy demo``: the main job, in two minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvpolicy.commands.arguments import STALE, find_own, split, stale_from
from kvpolicy.commands.console import console
from kvpolicy.commands.progress import Bar
from kvpolicy.commands.sweep import say_failures, sweep
from kvpolicy.errors import ParameterError
from kvpolicy.lab.run import demo as lab

if TYPE_CHECKING:
    from kvpolicy.lab.compare.comparison import Entry
    from kvpolicy.lab.run.plan import Plan
    from kvpolicy.lab.run.runner import Prepared, Stale

__all__ = ["demo"]

_IMAGES, _ONE_BY_ONE = 200, 10


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the table and the pictures; made, or gone on with.")
    ] = Path("runs/demo"),
    images: Annotated[
        int | None,
        typer.Option(
            min=10,
            help=f"Images to draw with each policy, {_IMAGES} by default, or with each of "
            f"--decoders, {_ONE_BY_ONE}.",
        ),
    ] = None,
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    policies: Annotated[
        str | None,
        typer.Option(
            help=f"Compare only these, separated by commas; full is always there. By default "
            f"{','.join(lab.POLICIES)}, and then decoders."
        ),
    ] = None,
    decoders: Annotated[
        str | None,
        typer.Option(
            help=f"Compare only these, under {lab.DRAWN_UNDER}: sjd:window=16,sjd:window=32. By "
            f"default {','.join(lab.DECODERS)}, behind the policies."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    scored: Annotated[int, typer.Option(min=2, max=1000, help="Real images to score.")] = 256,
    stale: Annotated[bool | None, typer.Option("--stale/--keep-stale", help=STALE)] = None,
) -> None:
    """Draw images with each policy from a fraction of the cache, and measure what it costs.

    The model is fashion-ar, trained on real photographs, and ships with kvpolicy. A policy has a
    process and a thread of its own, as many at a time as there are processors. Writes results.json,
    images.png and retention.png; the folder is a run's, which kvpolicy report reads, and the same
    command goes on where one was interrupted. Then decoders draw a few images one by one, in a
    folder of its own: decoders.json and images.png in decoders/.
    """
    from kvpolicy.lab.run.runner import prepare

    if policies is not None and decoders is not None:
        raise ParameterError(
            f"--decoders compares decoders under {lab.DRAWN_UNDER}, and --policies policies under "
            f"sequential decoding: give one of them; kvpolicy ablate takes both"
        )
    jobs = []
    if decoders is None:
        chosen = lab.POLICIES if policies is None else split(policies)
        jobs.append(_of_policies(chosen, budget, images or _IMAGES, scored, seed, out))
    if policies is None:
        others = lab.DECODERS if decoders is None else split(decoders)
        count = _ONE_BY_ONE if decoders is None or images is None else images
        jobs.append(_of_decoders(others, budget, count, seed, out))
    prepared = [prepare(job.plan) for job in jobs]  # all, before anything is measured
    for job, cells in zip(jobs, prepared, strict=True):
        _compare(job, cells, stale_from(stale))


@dataclass(frozen=True)
class _Job:
    """A plan, and what becomes of its figures.

    Attributes:
        plan: what is run.
        out: folder of the run.
        name: of the file with the figures.
        tell: the figures of a comparison, and their table.
    """

    plan: Plan
    out: Path
    name: str
    tell: Callable[[Sequence[Entry]], tuple[Sequence[lab.Row | lab.DecoderRow], Table]]


def _of_policies(
    policies: Sequence[str], budget: str, images: int, scored: int, seed: int, out: Path
) -> _Job:
    plan = lab.plan(policies, budget, images=images, scored=scored, seed=seed)
    find_own(*(policy.name for policy in plan.policies))

    def tell(entries: Sequence[Entry]) -> tuple[list[lab.Row], Table]:
        rows = lab.rows(entries)
        return rows, _table(rows, images, scored, budget)

    return _Job(plan, out, "results.json", tell)


def _of_decoders(decoders: Sequence[str], budget: str, images: int, seed: int, out: Path) -> _Job:
    plan = lab.decoder_plan(decoders, budget, images=images, seed=seed)

    def tell(entries: Sequence[Entry]) -> tuple[list[lab.DecoderRow], Table]:
        rows = lab.decoder_rows(entries)
        return rows, _decoder_table(rows, images, budget)

    return _Job(plan, out / "decoders", "decoders.json", tell)


def _compare(job: _Job, prepared: Prepared, stale: Stale) -> None:
    """Run a plan, write its figures and pictures, and print its table."""
    from kvpolicy.lab.compare.comparison import compare
    from kvpolicy.lab.compare.comparison_file import write_comparison
    from kvpolicy.lab.run.executors import Processes, processors
    from kvpolicy.lab.run.outputs import image_sheets, retention_sheets
    from kvpolicy.lab.run.runner import writing

    out = job.out
    workers = Processes(min(processors(), len(prepared.cells)))
    first = job.plan.metrics or (prepared.metrics[0].name,)
    main = next(metric for metric in prepared.metrics if metric.name == first[0])
    progress = Bar(main, workers.workers, console)
    folder = sweep(prepared, out, workers, 1, progress, stale)
    entries = compare(list(folder.finished()), prepared.metrics)
    if not entries:
        say_failures(progress, out)
    rows, table = job.tell(entries)
    sheets = image_sheets(entries, folder.subject.class_names, main)
    with writing(out):
        write_comparison(out, entries)
        lab.write_rows(rows, out / job.name)
        written = [out / job.name]
        for kind, figures in (("images", sheets), ("retention", retention_sheets(entries, main))):
            for figure in figures.values():  # one: there is one budget
                figure.savefig(out / f"{kind}.png", dpi=200)
                written.append(out / f"{kind}.png")
    console.print(table)
    for file in written:
        console.print(f"wrote {file}", markup=False, highlight=False)
    say_failures(progress, out)


def _decoder_table(rows: Sequence[lab.DecoderRow], images: int, budget: str) -> Table:
    """What decoders save, narrow enough for 80 columns."""
    table = Table(
        title=f"{images} images, one at a time: cache of {budget} of the image",
        caption="passes: of the model, an image; times as fast: as the full cache, token by token; "
        "class: drawn images that a classifier recognises; Fréchet: distance of the drawn images "
        "to real ones, lower is better.",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title_style="bold",
        caption_justify="left",
    )
    table.add_column("drawn by", no_wrap=True)
    for heading in ("passes", "s/image", "times as fast", "class", "Fréchet"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.drawn_by,
            f"{row.passes:.0f}",
            f"{row.seconds:.2f}",
            "-" if row.times_as_fast is None else f"{row.times_as_fast:.2f}",
            f"{row.class_accuracy:.0%}",
            "-" if row.frechet is None else f"{row.frechet:.2f}",
        )
    return table


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
