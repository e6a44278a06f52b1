"""``kvpolicy demo``: the main job, in two minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.table import Table

from kvpolicy.commands.arguments import STALE, find_own, pair, split, stale_from
from kvpolicy.commands.console import console
from kvpolicy.commands.progress import Bar
from kvpolicy.commands.sweep import say_failures, sweep
from kvpolicy.errors import ParameterError
from kvpolicy.lab.run import demo as lab
from kvpolicy.lab.run.plan import SEQUENTIAL

if TYPE_CHECKING:
    from kvpolicy.lab.compare.comparison import Entry
    from kvpolicy.lab.run.plan import Plan
    from kvpolicy.lab.run.runner import Prepared, Stale

__all__ = ["demo"]

_ONE_BY_ONE = 10
#: Heading, format and explanation of a figure.
_FIGURES = {
    "bits_per_pixel": ("bits/px", "{:.4f}", "of real test images under that cache"),
    "bits_per_code": ("bits/code", "{:.4f}", "of held-out drawings under that cache"),
    "frechet": ("Fréchet", "{:.2f}", "distance of the drawn images to real ones"),
    "class_accuracy": ("class", "{:.0%}", "drawn images that a classifier recognises"),
    "divergence": ("diverges", "{:.4f}", "bits a code, of what is drawn from the full cache's"),
}


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the table and the pictures; made, or gone on with.")
    ] = Path("runs/demo"),
    subject: Annotated[str, typer.Option(help="fashion-ar, or clipart-ar.")] = "fashion-ar",
    images: Annotated[
        int | None,
        typer.Option(
            min=10,
            help=f"Images to draw with each policy, 200 by default, 20 of clipart-ar, or with each "
            f"of --decoders, {_ONE_BY_ONE}.",
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
            help=f"Compare only these, under {lab.DRAWN_UNDER}: sjd:window=16,sjd:window=32; or "
            f"lpd:passes=48, with fashion-lpd, under full and {lab.GROUPS_UNDER}. By default "
            f"{','.join(lab.DECODERS)}, behind the policies."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    scored: Annotated[
        int | None,
        typer.Option(min=2, max=1000, help="Real images to score; 256, or 100 of clipart-ar."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the subject, e.g. line_breaks=true; repeatable."),
    ] = None,
    stale: Annotated[bool | None, typer.Option("--stale/--keep-stale", help=STALE)] = None,
) -> None:
    """Draw images with each policy from a fraction of the cache, and measure what it costs.

    The model is fashion-ar, trained on real photographs, and ships with kvpolicy; or clipart-ar,
    which draws in colour from words. A policy has a process and a thread of its own, as many at a
    time as there are processors. Writes results.json, images.png and retention.png; the folder is a
    run's, which kvpolicy report reads, and the same command goes on where one was interrupted. Then
    decoders draw a few images one by one, in a folder of its own: decoders.json and images.png in
    decoders/. Those that draw in groups do so with fashion-lpd, in groups/.
    """
    from kvpolicy.lab.run.runner import prepare

    if policies is not None and decoders is not None:
        raise ParameterError(
            f"--decoders compares decoders under {lab.DRAWN_UNDER}, and --policies policies under "
            f"sequential decoding: give one of them; kvpolicy ablate takes both"
        )
    about = lab.shown(subject)
    options = dict(pair(text, "--option", "line_breaks=true") for text in option or [])
    of = _Subject(subject, options, about)
    jobs: list[_Job] = []
    if decoders is None:
        chosen = lab.POLICIES if policies is None else split(policies)
        count, real = images or about.images, scored or about.scored
        jobs.append(_of_policies(of, chosen, budget, count, real, seed, out))
    if policies is None:
        others = lab.DECODERS if decoders is None else split(decoders)
        count = _ONE_BY_ONE if decoders is None or images is None else images
        by_line, by_group = lab.by_line_or_group(others)
        if by_group and subject != "fashion-ar":
            raise ParameterError(
                f"{subject} is not asked for tokens in groups, as {by_group[0]!r} does: leave "
                f"--subject out to compare fashion-lpd, which is, with fashion-ar"
            )
        jobs.append(_of_decoders(of, by_line or [SEQUENTIAL], budget, count, seed, out))
        if by_group:
            jobs.append(_of_groups(by_group, about, budget, count, seed, out))
    prepared = [prepare(job.plan) for job in jobs]  # all, before anything is measured
    found: list[lab.Row | lab.DecoderRow] = []
    for job, cells in zip(jobs, prepared, strict=True):
        found += _compare(job, cells, stale_from(stale), found)


#: Figures of a job.
_Rows: TypeAlias = Sequence[lab.Row | lab.DecoderRow]


@dataclass(frozen=True)
class _Job:
    """A plan, and what becomes of its figures.

    Attributes:
        plan: what is run.
        out: folder of the run.
        name: of the file with the figures.
        tell: given a comparison, and the figures of the jobs before, its figures and their table.
    """

    plan: Plan
    out: Path
    name: str
    tell: Callable[[Sequence[Entry], _Rows], tuple[_Rows, Table]]


@dataclass(frozen=True)
class _Subject:
    """What the demo is of.

    Attributes:
        name: of the subject.
        options: that the user gives it.
        shown: what is measured.
    """

    name: str
    options: dict[str, Any]
    shown: lab.Shown


def _of_policies(
    of: _Subject,
    policies: Sequence[str],
    budget: str,
    images: int,
    scored: int,
    seed: int,
    out: Path,
) -> _Job:
    plan = lab.plan(
        policies,
        budget,
        images=images,
        scored=scored,
        seed=seed,
        subject=of.name,
        options=of.options,
    )
    find_own(*(policy.name for policy in plan.policies))

    def tell(entries: Sequence[Entry], _: _Rows) -> tuple[_Rows, Table]:
        rows = lab.rows(entries, of.name)
        return rows, _table(rows, of.shown, images, scored, budget)

    return _Job(plan, out, "results.json", tell)


def _of_decoders(
    of: _Subject, decoders: Sequence[str], budget: str, images: int, seed: int, out: Path
) -> _Job:
    plan = lab.decoder_plan(
        decoders, budget, images=images, seed=seed, subject=of.name, options=of.options
    )

    def tell(entries: Sequence[Entry], _: _Rows) -> tuple[_Rows, Table]:
        rows = lab.decoder_rows(entries, of.name)
        return rows, _decoder_table(rows, of.name, of.shown, images, budget)

    return _Job(plan, out / "decoders", "decoders.json", tell)


def _of_groups(
    decoders: Sequence[str], about: lab.Shown, budget: str, images: int, seed: int, out: Path
) -> _Job:
    """fashion-lpd, with the times of fashion-ar's full cache, which has been drawn from before."""
    plan = lab.group_plan(decoders, budget, images=images, seed=seed)

    def tell(entries: Sequence[Entry], before: _Rows) -> tuple[_Rows, Table]:
        baseline = [row for row in before if isinstance(row, lab.DecoderRow)]
        rows = lab.decoder_rows(entries, baseline=baseline)
        return rows, _decoder_table(rows, "fashion-lpd", about, images, budget)

    return _Job(plan, out / "groups", "decoders.json", tell)


def _compare(job: _Job, prepared: Prepared, stale: Stale, before: _Rows) -> _Rows:
    """Run a plan, write its figures and pictures, and print its table; gives the figures."""
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
    rows, table = job.tell(entries, before)
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
    return rows


def _decoder_table(
    rows: Sequence[lab.DecoderRow], model: str, shown: lab.Shown, images: int, budget: str
) -> Table:
    """What decoders save, narrow enough for 80 columns."""
    others = "fashion-ar's" if model == "fashion-lpd" else "the"
    drawn = shown.drawn[::-1]  # what few images tell stands first
    table = Table(
        title=f"{model}: {images} images, one at a time: cache of {budget} of the image",
        caption=f"passes: of the model, an image; times as fast: as {others} full cache, token by "
        f"token; {_explained(drawn)}.",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title_style="bold",
        caption_justify="left",
    )
    table.add_column("drawn by", no_wrap=True)
    headings = [_FIGURES[name][0] for name in drawn]
    for heading in ("passes", "s/image", "times as fast", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.drawn_by,
            f"{row.passes:.0f}",
            f"{row.seconds:.2f}",
            "-" if row.times_as_fast is None else f"{row.times_as_fast:.2f}",
            *(_spelled(name, row.figures[name]) for name in drawn),
        )
    return table


def _table(
    rows: Sequence[lab.Row], shown: lab.Shown, images: int, scored: int, budget: str
) -> Table:
    """The figures, narrow enough for 80 columns."""
    table = Table(
        title=f"cache of {budget} of the image: {scored} real images scored, {images} images drawn",
        caption="peak: cached tokens a head, prefix included, mean over layers; MB: cache of one "
        f"image; {_explained([shown.main])}; difference: to full on the same images, with its 95% "
        f"interval; {_explained(shown.drawn)}; img/s: drawn by one thread.",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_style="bold",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    main, *others = (_FIGURES[name][0] for name in (shown.main, *shown.drawn))
    for heading in ("peak", "MB", main, "difference to full", *others, "img/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.policy,
            f"{row.peak_tokens:g}",
            f"{row.cache_bytes / 1e6:.2f}",
            _spelled(shown.main, row.figures[shown.main]),
            "-"
            if row.policy == "full" or row.delta_bits is None
            else f"{row.delta_bits:+.4f} ({row.delta_low:+.3f}…{row.delta_high:+.3f})",
            *(_spelled(name, row.figures[name]) for name in shown.drawn),
            f"{row.images_per_second:.{1 if row.images_per_second >= 1 else 2}f}",
        )
    return table


def _spelled(name: str, value: float | None) -> str:
    return "-" if value is None else _FIGURES[name][1].format(value)


def _explained(names: Sequence[str]) -> str:
    """What headings mean."""
    said = []
    for name in names:
        heading, _, about = _FIGURES[name]
        said.append(f"{heading}: {about}{'' if name == 'class_accuracy' else ', lower is better'}")
    return "; ".join(said)
