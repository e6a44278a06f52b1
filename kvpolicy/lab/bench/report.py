"""Tables and a picture of what a bench has found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpolicy.lab.bench.contender import Contender, Workload
from kvpolicy.lab.bench.fit import Fit
from kvpolicy.lab.bench.machine import Machine
from kvpolicy.lab.bench.rounds import Plan, lines_of_round
from kvpolicy.lab.bench.summary import Figures, Ratio, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Grid", "conditions", "grids", "machine_line", "markdown", "plot"]

#: Colours that people with any colour vision can tell apart (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: Where there are more contenders than colours.
_MARKERS = ("", "o", "s", "^", "v", "D")
#: Of a floor and a skip, and of their variants.
_REFERENCE = {"floor": "#555555", "skip": "#AAAAAA"}
_DASHES: tuple[Any, ...] = (":", "-.", "--", (0, (1, 4)), (0, (6, 4)))


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: above it.
        headings: of its columns; the first one is text, the others are numbers.
        rows: cells.
        note: below it: what the columns mean.
    """

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str


def conditions(
    workload: Workload, plan: Plan, machine: Machine, real_layers: int, finished: int
) -> list[str]:
    """What a reader must know about a run, what was left out to save time included."""
    scaled = "" if workload.layers == real_layers else f" of {real_layers}"
    rows = [
        f"{workload.shape}: {workload.layers}{scaled} layers, random weights, batch "
        f"{workload.batch}, {workload.dtype}; budget {workload.budget}, {workload.capacity} slots; "
        f"{plan.lines} lines of {plan.line_length} tokens",
        machine_line(machine),
        f"rounds finished: {finished}; contenders in turn "
        + ("image by image" if plan.whole_images else "line by line"),
    ]
    if plan.every > 1:
        rows.append(
            f"measured {len(lines_of_round(plan, 0))} of {plan.lines} lines a round, another "
            f"choice each round; the lines between were filled with random keys and values, and "
            f"their times are interpolated"
        )
    return rows


def machine_line(machine: Machine) -> str:
    """The machine in a line."""
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads; torch "
        f"{machine.torch}; copy {machine.copy / 1e9:.1f} GB/s, matmul "
        f"{machine.matmul / 1e9:.0f} GFLOP/s" + ("; with the CPU kernel" if machine.kernel else "")
    )


def grids(summary: Summary, contenders: Sequence[Contender], fit: Fit | None = None) -> list[Grid]:
    """The tables: times, ratios, memory and the roofline, and how many sequences fit."""
    times = [
        (
            f.name,
            f"{f.step * 1e3:.2f}",
            f"{f.image:.1f}",
            "-" if f.cache is None or f.kind == "skip" else f"{f.cache * 1e3:.2f}",
            "-" if f.overhead is None or f.kind in ("floor", "skip") else _percent(f.overhead),
            "-" if f.flat is None else f"{f.flat:+.1%}",
            "-" if f.flat_to_floor is None else f"{f.flat_to_floor:+.1%}",
        )
        for f in summary.figures
    ]
    tables = [
        Grid(
            "Time",
            ("", "ms/step", "s/image batch", "cache ms/step", "over floor", "flat", "flat/floor"),
            times,
            "ms/step: median. cache: above the same model with attention left out (skip). over "
            "floor: above the same model attending to as many fixed slots, once the budget has "
            "filled [smallest, largest round]; compiled and skinny against a skip and a floor that "
            "are so, too. flat: the last tenth of the steps against as many "
            "right after the budget has filled; flat/floor: the same, relative to the floor's "
            "steps at that time.",
        )
    ]
    for title, ratios, note in (
        ("Times as fast", summary.faster, "Time of an image batch, the column's over the row's"),
        ("Times cheaper a cache", summary.cheaper, "Cache cost, the column's over the row's"),
    ):
        others = list(dict.fromkeys(other for _, other in ratios))
        rows = [
            (c.name, *(_cell(ratios.get((c.name, other))) for other in others))
            for c in contenders
            if any(policy == c.name for policy, _ in ratios)
        ]
        if rows:
            note += "; [smallest, largest round]."
            tables.append(Grid(title, ("", *others), rows, note))
    tables.append(
        Grid(
            "Memory and roofline",
            ("", "tokens read", "MB/step", "roofline ms", "of roofline", "cache MB", "peak MB"),
            [_memory_row(figures) for figures in summary.figures],
            "tokens read: cached tokens that a layer's attention reads a step, mean. MB/step: "
            "weights, keys and values. roofline: the longer of reading these at the speed of a "
            "copy and multiplying at that of a large product. of roofline: mean step in "
            "rooflines. cache: keys and values. peak: growth of a process of its own during an "
            "image.",
        )
    )
    if fit is not None:
        tables.append(
            Grid(
                "Largest batch",
                ("", "sequences", "GB"),
                [(n, str(one.batch), f"{one.used / 1e9:.2f}") for n, one in fit.largest.items()],
                f"The largest batch whose image fits into {fit.limit / 1e9:g} GB, weights and a "
                f"step's own tensors included, found to a sixteenth; GB: of that batch.",
            )
        )
    return tables


def _memory_row(figures: Figures) -> tuple[str, ...]:
    return (
        figures.name,
        f"{figures.tokens_read:.0f}",
        f"{figures.bytes_read / 1e6:.0f}",
        f"{figures.roofline * 1e3:.2f}",
        f"{figures.mean_step / figures.roofline:.2f}",
        f"{figures.cache_bytes / 1e6:.1f}",
        "-" if figures.memory is None else f"{figures.memory / 1e6:.1f}",
    )


def _percent(ratio: Ratio) -> str:
    return f"{ratio.value:+.1%} [{ratio.low:+.1%}, {ratio.high:+.1%}]"


def _cell(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def markdown(tables: Sequence[Grid], facts: Sequence[str], command: str) -> str:
    """A section of a page."""
    parts = [f"```console\n$ {command}\n```\n", *(f"- {fact}" for fact in facts), ""]
    for table in tables:
        parts += [f"**{table.title}**\n", _row(table.headings)]
        parts.append(_row(["---", *["---:"] * (len(table.headings) - 1)]))
        parts += [_row(row) for row in table.rows]
        parts += ["", table.note, ""]
    return "\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(summary: Summary, workload: Workload, plan: Plan, prefix: int) -> Figure:
    """Time a step against the position: a full cache's slope, a policy's flat line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes: Any = figure.subplots()
    dashes = {kind: itertools.cycle(_DASHES) for kind in _REFERENCE}
    looks = itertools.cycle(itertools.product(_MARKERS, _COLOURS))
    ends = []
    for figures in summary.figures:
        lines, seconds = summary.by_line[figures.name]
        at = [prefix + (line + 0.5) * plan.line_length for line in lines]
        marker = ""
        style: Any
        if figures.kind in _REFERENCE:
            colour, style = _REFERENCE[figures.kind], next(dashes[figures.kind])
        else:
            (marker, colour), style = next(looks), "-" if figures.kind == "policy" else "--"
        axes.plot(
            at,
            [s * 1e3 for s in seconds],
            linestyle=style,
            color=colour,
            marker=marker,
            markersize=4,
            label=figures.name,
            lw=1.6,
        )
        ends.append(seconds[-1])
    order = sorted(range(len(ends)), key=lambda index: -ends[index])
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside right center",
        frameon=False,
        fontsize=8.5,
    )
    axes.axvline(workload.capacity, color="#BBBBBB", lw=0.8, zorder=0)
    axes.annotate(
        "budget full",
        (workload.capacity, 0),
        xytext=(4, 4),
        textcoords="offset points",
        color="#777777",
        fontsize=8,
    )
    axes.set_ylim(bottom=0)
    axes.set_xlim(prefix, prefix + plan.lines * plan.line_length)
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("time a step (ms)")
    axes.set_title(
        f"{workload.shape}, layers: {workload.layers}, batch {workload.batch}, {workload.dtype}, "
        f"budget {workload.budget}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure
