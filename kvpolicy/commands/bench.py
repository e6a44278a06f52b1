"""``kvpolicy bench``: what a decode step costs, against a floor and what others offer."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvpolicy.commands.console import console
from kvpolicy.errors import ParameterError
from kvpolicy.lab.bench.contender import BASELINES, Workload, load_shape
from kvpolicy.lab.bench.fit import Fit
from kvpolicy.lab.bench.machine import survey
from kvpolicy.lab.bench.peers import build_environment
from kvpolicy.lab.bench.report import Grid, grids
from kvpolicy.lab.bench.run import Bench, capacity_of, enlist, plan_of, torch_device
from kvpolicy.lab.bench.summary import Summary

__all__ = ["bench"]

_DTYPES = ("float32", "bfloat16", "float16")


def bench(
    shape: Annotated[str, typer.Option(help="Whose dimensions: llamagen-b, lumina-768, …")] = (
        "llamagen-b"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 96, '4 lines'.")] = "1/6",
    policies: Annotated[
        str, typer.Option(help="Policies; linear@compiled@skinny: how its model runs.")
    ] = ("linear,streaming_llm,h2o,pyramid"),
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

    Writes results.json, tables.md and steps.png; Ctrl-C keeps what is finished.
    """
    if dtype not in _DTYPES:
        raise ParameterError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
    if llamagen is not None and not (llamagen / "autoregressive" / "models" / "gpt.py").exists():
        raise ParameterError(f"--llamagen {llamagen}: there is no autoregressive/models/gpt.py")
    contenders = enlist(
        _names(policies),
        _names(baselines),
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
        batch=batch,
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
        _print(summary, job, job.facts(measured), fit)
    for name in ("results.json", "tables.md", "steps.png"):
        console.print(f"wrote {out / name}")


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _print(summary: Summary, job: Bench, facts: list[str], fit: Fit | None) -> None:
    for fact in facts:
        console.print(fact, highlight=False)
    # A table that is wider than the terminal is better than one with broken numbers.
    wide = Console(width=max(console.width, 150))
    for grid in grids(summary, job.contenders, fit):
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
