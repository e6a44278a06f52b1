"""``kvpolicy ablate``: policies × parameters × budgets × decoders × seeds on one subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kvpolicy.commands.arguments import (
    STALE,
    find_own,
    pair,
    split,
    stale_from,
    value_of,
    whole_number,
)
from kvpolicy.commands.console import console
from kvpolicy.commands.progress import progress_for, spell_seconds
from kvpolicy.commands.sweep import note, say_failures, sweep
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.compare.comparison import Entry
from kvpolicy.lab.run.executor import Executor
from kvpolicy.lab.run.executors import make_executor
from kvpolicy.lab.run.plan import Plan, read_plan
from kvpolicy.lab.run.subject import MetricInfo

__all__ = ["ablate"]

_PLAN = "Plan"


def ablate(
    out: Annotated[Path, typer.Option(help="Folder of the run; made, or gone on with.")],
    plan: Annotated[
        Path | None, typer.Option(help="A plan in YAML or JSON, instead of the options below it.")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(
            help="fashion-ar, fashion-lpd, clipart-ar, or package.module:name of your own.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas, or package.module:Class; linear@sjd for one with a "
            "decoder of its own; full is always there.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="1/6, 25%, 130 or '4 lines', separated by commas; 1/6 if none is given.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    decoders: Annotated[
        str | None,
        typer.Option(
            help="What draws tokens: sequential,sjd:window=32:draft=above; sequential if none.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Numbers, separated by commas; 0 if none.", rich_help_panel=_PLAN),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Values to try of a policy's parameter: linear.recent_lines=1,2.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the subject, e.g. images=100; repeatable.", rich_help_panel=_PLAN),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Only these, separated by commas; all if none.", rich_help_panel=_PLAN),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="Where cells run: inline, processes or ray.")
    ] = "processes",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time; as many as there are processors.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Of each worker; more than one pay for large models only.")
    ] = 1,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster that runs already: auto, or host:port.")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Record every decision on a few items, for the report.")
    ] = False,
    own: Annotated[
        list[str] | None,
        typer.Option(
            help="package.module:name of your own that the plan's file may name; repeatable."
        ),
    ] = None,
    stale: Annotated[bool | None, typer.Option("--stale/--keep-stale", help=STALE)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and how long they will take.")
    ] = False,
) -> None:
    """Compare policies on one subject: a resumable sweep, tables and plots.

    Nothing that has finished is lost, however a run ends: the same command goes on.
    """
    from kvpolicy.lab.run.outputs import write_outputs
    from kvpolicy.lab.run.runner import prepare, writing

    given = {
        "subject": subject,
        "policies": policies,
        "budgets": budgets,
        "decoders": decoders,
        "seeds": seeds,
        "set": set_,
        "option": option,
        "metrics": metrics,
        "trace": trace,
    }
    wanted = _plan(plan, {name: value for name, value in given.items() if value}, own or ())
    find_own(wanted.subject, *(policy.name for policy in wanted.policies))
    runs_on = make_executor(executor, workers, threads, address)
    prepared = prepare(wanted)
    if dry_run:
        _dry_run(prepared, out, runs_on, threads)
        return
    main = next((metric for metric in prepared.metrics if metric.better is not None), None)
    progress = progress_for(main, runs_on.workers, console)
    folder = sweep(prepared, out, runs_on, threads, progress, stale_from(stale))
    if progress.count:
        with writing(out):
            entries, files = write_outputs(folder, prepared.metrics)
        if console.is_terminal and main is not None:
            console.print(_result(entries, main))
        for file in files:
            if file.suffix != ".svg":
                note(f"wrote {file}")
    say_failures(progress, out)


def _plan(file: Path | None, given: dict[str, Any], own: Sequence[str]) -> Plan:
    """The plan of a file, or of options.

    Raises:
        ParameterError: both are given, or too little, or an option can't be read.
    """
    if file is not None:
        if given:
            raise ParameterError(
                f"--plan says what is compared; it does not go together with --{next(iter(given))}"
            )
        return read_plan(file, own)
    if own:
        raise ParameterError("--own is for --plan; options name what is your own by themselves")
    for name in ("subject", "policies"):
        if name not in given:
            raise ParameterError(f"--{name} is missing (or --plan with a file that says it)")
    grids = _grids(given.get("set", []))
    parted = [policy.partition("@") for policy in split(given["policies"])]
    names = [name for name, _, _ in parted]
    for name in grids:
        if name not in names:
            raise ParameterError(
                f"--set {name}.…: policy {name!r} is not among --policies; "
                f"{near_matches(name, names)}"
            )
    fields: dict[str, Any] = {
        "subject": given["subject"],
        "policies": [
            {"name": name, "parameters": grids.get(name, {})} | ({"decoders": [by]} if at else {})
            for name, at, by in parted
        ],
        "options": dict(pair(text, "--option", "images=100") for text in given.get("option", [])),
    }
    if "trace" in given:
        fields["trace"] = True
    for name in ("budgets", "decoders", "metrics"):
        if name in given:
            fields[name] = split(given[name])
    if "seeds" in given:
        fields["seeds"] = [whole_number(text, "--seeds") for text in split(given["seeds"])]
    return Plan(**fields)


def _grids(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``linear.recent_lines=1,2`` as ``{"linear": {"recent_lines": [1, 2]}}``."""
    grids: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        policy, dot, parameter = name.rpartition(".")
        if not (equals and dot and policy and parameter and values):
            raise ParameterError(f"--set {text!r} is not like linear.recent_lines=1,2")
        found = [value_of(value) for value in values.split(",")]
        grids.setdefault(policy, {})[parameter] = found if len(found) > 1 else found[0]
    return grids


def _result(entries: Sequence[Entry], metric: MetricInfo) -> Table:
    """The main figure of every policy and budget; the rest is in the files."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("policy")
    for heading in ("budget", metric.label, "difference to full", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        if (finding := entry.findings.get(metric.name)) is None:
            continue
        difference = finding.difference
        text = "-" if difference is None else f"{difference.value:+.4f}"
        if difference is not None and difference.low is not None and difference.high is not None:
            text += f" ({difference.low:+.4f}…{difference.high:+.4f})"
        remark = "" if difference is None or finding.clear else "noise?"
        value = f"{finding.estimate.value:.4f}"
        table.add_row(Text(entry.label), entry.budget or "all", value, text, remark)
    return table


def _dry_run(prepared: Any, out: Path, executor: Executor, threads: int) -> None:
    """Print every cell and an estimate of the time."""
    from kvpolicy.lab.compare.estimate import estimate_seconds

    seconds, source = estimate_seconds(prepared, out, threads)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("policy", "budget", "seed", "cell", ""):
        table.add_column(heading, no_wrap=heading != "cell")
    for cell in prepared.cells:
        state = "finished" if seconds.get(cell.id) == 0 else ""
        table.add_row(Text(cell.label), cell.budget or "all", str(cell.seed), cell.id, state)
    console.print(table)
    for item in prepared.left_out:
        note(f"left out: {item.label} at {item.budget}: {item.reason}")
    waiting = sum(1 for cell in prepared.cells if seconds.get(cell.id) != 0)
    text = f"{len(prepared.cells)} cells, {waiting} to be measured"
    if source is None:
        text += "; how long it takes can't be said: the subject has no estimate()"
    else:
        workers = max(1, min(executor.workers, waiting))
        total = sum(seconds.values()) / workers
        text += f"; about {spell_seconds(total)} with {workers} at a time ({source})"
    console.print(text, highlight=False)
