"""``kvpolicy bench``: what a decode step costs, and what decoders save, each against others."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvpolicy.commands.arguments import find_own, split
from kvpolicy.commands.console import Terminal, console
from kvpolicy.errors import ParameterError
from kvpolicy.lab.bench.contender import BASELINES, Workload, load_shape
from kvpolicy.lab.bench.drawing import Drawing, drawers, images_of_turn
from kvpolicy.lab.bench.machine import survey
from kvpolicy.lab.bench.peers import build_environment
from kvpolicy.lab.bench.report import Grid, grids, machine_line
from kvpolicy.lab.bench.report import markdown as as_markdown
from kvpolicy.lab.bench.run import Bench, capacity_of, enlist, plan_of, torch_device
from kvpolicy.lab.run.demo import DRAWN_UNDER, GROUPS_UNDER, by_line_or_group
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.subject import load_subject

__all__ = ["bench"]

_DTYPES = ("float32", "bfloat16", "float16")
_POLICIES = "linear,streaming_llm,h2o,pyramid"
#: Options that go together with ``--decoders``.
_DRAWING = (
    "decoders",
    "subject",
    "policies",
    "budget",
    "batch",
    "rounds",
    "minutes",
    "threads",
    "seed",
    "out",
    "markdown",
)


def bench(
    context: typer.Context,
    shape: Annotated[str, typer.Option(help="Whose dimensions: llamagen-b, lumina-768, …")] = (
        "llamagen-b"
    ),
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences; 8 by default, 1 with --decoders.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 96, '4 lines'.")] = "1/6",
    policies: Annotated[
        str | None,
        typer.Option(
            help=f"Policies; linear@compiled@skinny: how its model runs. By default {_POLICIES}; "
            f"{DRAWN_UNDER} with --decoders, {GROUPS_UNDER} with those that draw in groups."
        ),
    ] = None,
    baselines: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(BASELINES)}, as policies are spelled; floor and skip tell what a "
            f"cache costs."
        ),
    ] = ",".join(BASELINES),
    peers: Annotated[
        bool, typer.Option("--peers", help="kvpress too, in an environment that pip makes for it.")
    ] = False,
    peers_environment: Annotated[
        Path, typer.Option(help="Where that environment is kept for the next time.")
    ] = Path("~/.cache/kvpolicy/peers"),
    llamagen: Annotated[
        Path | None, typer.Option(help="A checkout of LlamaGen: its official generate too.")
    ] = None,
    decoders: Annotated[
        str | None,
        typer.Option(
            help="Draw whole images with these instead, each in turn: sjd:window=16,sjd:window=32; "
            "or, with --subject fashion-lpd, lpd:passes=48."
        ),
    ] = None,
    subject: Annotated[
        str, typer.Option(help="What draws them: a subject with real weights.")
    ] = "fashion-ar",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(_DTYPES)}.")] = "float32",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Fewer layers than the real model, to save time.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Image tokens, rounded up to lines; all by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Image batches of each contender.")] = 3,
    every: Annotated[
        int, typer.Option(min=1, help="Measure every n-th line; fill the lines between.")
    ] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, once a round is finished.")
    ] = None,
    whole_images: Annotated[
        bool,
        typer.Option("--whole-images", help="Turns of an image, not a line: one cache at a time."),
    ] = False,
    memory: Annotated[
        bool, typer.Option(help="Also watch each contender's memory in a process of its own.")
    ] = True,
    largest_batch: Annotated[
        float | None,
        typer.Option(min=0, help="Also find each contender's largest batch within so many GB."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of torch; its own choice by default. Printed."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and tokens.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables and picture.")] = Path("runs/bench"),
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown, for a page.")
    ] = False,
) -> None:
    """Time a decode step with each cache, in alternation, on a model of real dimensions.

    With --decoders whole images are drawn, and passes and times compared with sequential decoding.
    Writes results.json, tables.md and steps.png; Ctrl-C keeps what is finished.
    """
    if decoders is not None:
        _refuse_step_options(context)
        others = split(decoders)
        _, in_groups = by_line_or_group(others)
        usual = GROUPS_UNDER if in_groups else DRAWN_UNDER
        _draw(
            subject,
            split(policies or usual),
            others,
            budget=budget,
            batch=batch or 1,
            rounds=rounds,
            minutes=minutes,
            threads=threads,
            seed=seed,
            out=out,
            markdown=markdown,
        )
        return
    if _is_given(context, "subject"):
        raise ParameterError("--subject is what decoders draw with: give --decoders, too")
    if dtype not in _DTYPES:
        raise ParameterError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
    if llamagen is not None and not (llamagen / "autoregressive" / "models" / "gpt.py").exists():
        raise ParameterError(f"--llamagen {llamagen}: there is no autoregressive/models/gpt.py")
    contenders = enlist(
        split(policies or _POLICIES),
        split(baselines),
        presses=peers,
        llamagen=llamagen is not None,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    torch_device(device)
    kind: torch.dtype = getattr(torch, dtype)
    model = load_shape(shape, layers=layers, dtype=kind, device=device, seed=seed)
    plan = plan_of(
        model.layout,
        steps=steps,
        rounds=rounds,
        every=every,
        minutes=minutes,
        whole_images=whole_images,
    )
    workload = Workload(
        shape=shape,
        batch=batch or 8,
        budget=budget,
        capacity=capacity_of(budget, model.layout),
        layers=model.dimensions.layers,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    environment = None
    if peers:
        with console.status("an environment for kvpress"):
            environment = build_environment(peers_environment.expanduser())
    job = Bench(
        model=model,
        workload=workload,
        plan=plan,
        contenders=contenders,
        machine=survey(device, kind),
        real_layers=model.real_layers,
        command=shlex.join(["kvpolicy", *sys.argv[1:]]),
        environment=environment,
        checkout=None if llamagen is None else llamagen.resolve(),
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    grown: dict[str, int] = {}
    fit = None
    with Progress(*columns, console=console) as progress:
        watching = progress.add_task("memory", total=len(contenders), visible=memory)
        fitting = progress.add_task(
            "largest batch", total=len(contenders), visible=largest_batch is not None
        )
        running = progress.add_task("rounds", total=plan.measured * len(contenders))
        if memory:
            grown = job.watch_memory(lambda count: progress.advance(watching, count))
        if largest_batch is not None:
            fit = job.fit(int(largest_batch * 1e9), lambda count: progress.advance(fitting, count))
        measured = job.measure(
            lambda count: progress.advance(running, count),
            lambda rounds: job.write(out, rounds, grown, fit),
        )
    if not measured.finished:
        console.print("interrupted before a round was finished: nothing to report")
        raise typer.Exit(130)
    summary = job.write(out, measured, grown, fit)
    if markdown:
        typer.echo((out / "tables.md").read_text(encoding="utf-8"))
    else:
        _show(job.facts(measured), grids(summary, job.contenders, fit))
    for name in ("results.json", "tables.md", "steps.png"):
        console.print(f"wrote {out / name}")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, and has not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_step_options(context: typer.Context) -> None:
    """Refuse options that say how steps of a model with random weights are timed."""
    for name in context.params:
        if name not in _DRAWING and _is_given(context, name):
            raise ParameterError(
                f"--{name.replace('_', '-')} is for steps, and --decoders draws whole images with "
                f"a subject; it goes together with {', '.join('--' + n for n in _DRAWING)}"
            )


def _draw(
    name: str,
    policies: Sequence[str],
    decoders: Sequence[str],
    *,
    budget: str,
    batch: int,
    rounds: int,
    minutes: float | None,
    threads: int | None,
    seed: int,
    out: Path,
    markdown: bool,
) -> None:
    """Draw in turns, and print and write what decoders save."""
    find_own(name, *policies)
    if threads is not None:
        torch.set_num_threads(threads)
    subject: Any = load_subject(name, {"batch": batch})
    entries = drawers(subject, name, policies, decoders, budget)
    machine = survey("cpu", torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("drawing"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("drawing", total=(rounds + 1) * len(entries))
        job = Drawing(subject, entries, batch, seed, lambda count: progress.advance(task, count))
        job.run(rounds, minutes)
    if not job.finished:
        console.print("interrupted before a round was finished: nothing to report")
        raise typer.Exit(130)
    facts = [
        f"{subject.name}, batch {batch}, budget {budget}; {images_of_turn(batch)} images a turn, "
        f"rounds finished: {job.finished}" + ", interrupted" * job.interrupted,
        machine_line(machine),
    ]
    command = shlex.join(["kvpolicy", *sys.argv[1:]])
    content = {
        "command": command,
        "subject": subject.name,
        "batch": batch,
        "budget": budget,
        "seed": seed,
        "machine": machine.as_dict(),
        **job.as_dict(),
    }
    write_whole(out / "results.json", json.dumps(content, indent=1) + "\n")
    write_whole(out / "tables.md", as_markdown([job.table()], facts, command))
    if markdown:
        typer.echo((out / "tables.md").read_text(encoding="utf-8"))
    else:
        _show(facts, [job.table()])
    for written in ("results.json", "tables.md"):
        console.print(f"wrote {out / written}")


def _show(facts: Sequence[str], tables: Sequence[Grid]) -> None:
    for fact in facts:
        console.print(fact, highlight=False)
    # A table that is wider than the terminal is better than one with broken numbers.
    wide = Terminal(width=max(console.width, 150))
    for grid in tables:
        wide.print(_table(grid))


def _table(grid: Grid) -> Table:
    table = Table(
        title=grid.title,
        caption=Text(grid.note, style="dim"),
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_style="bold",
        caption_justify="left",
    )
    for index, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
