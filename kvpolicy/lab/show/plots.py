"""Plots of a run: quality against budget, quality against bytes, and the Pareto front.

Every policy has a marker and a line style of its own besides its colour (Okabe and Ito's palette,
which the colour-blind can tell apart), so that the plots can be read in grey too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvpolicy.lab.compare.comparison import Entry, Estimate
from kvpolicy.lab.run.subject import MetricInfo

__all__ = ["pareto", "quality_against_budget", "quality_against_bytes"]

# M. Okabe and K. Ito, "Color universal design", 2008; without the yellow, too faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "text.parse_math": False,  # labels are other people's: a "$" is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "kvpolicy",
}


def quality_against_budget(entries: Sequence[Entry], metrics: Sequence[MetricInfo]) -> Figure:
    """One panel a quality metric, budget across; the main one as a loss against the full cache."""
    return _panels(entries, metrics, _tokens, "cached tokens a head (mean over layers)")


def quality_against_bytes(entries: Sequence[Entry], metrics: Sequence[MetricInfo]) -> Figure:
    """The same against what the cache takes, positions and observers included."""
    return _panels(entries, metrics, _kilobytes, "cache of one sequence, with overhead (kB)")


def pareto(entries: Sequence[Entry], metric: MetricInfo) -> Figure:
    """Main metric against bytes: who is beaten by nobody that takes no more.

    The front is a line of steps through filled marks; entries behind it are hollow. Where every
    entry can be compared with the full cache, the plot shows the difference to it.
    """
    evicting = [entry for entry in entries if metric.name in entry.findings and not entry.is_full]
    as_loss = all(entry.findings[metric.name].difference for entry in evicting)
    points = []
    for entry in evicting:
        finding = entry.findings[metric.name]
        points.append((_kilobytes(entry), finding.difference or finding.estimate, entry))
    sign = -1 if metric.better == "higher" else 1
    front: list[tuple[float, Estimate, Entry]] = []
    for point in sorted(points, key=lambda p: (p[0], sign * p[1].value)):
        if not front or sign * point[1].value < sign * front[-1][1].value:
            front.append(point)
    styles = _styles(evicting)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.8, 3.7), layout="constrained")
        axes = figure.add_subplot()
        on_front = [point[2] for point in front]
        for size, estimate, entry in points:
            colour, marker, _ = styles[entry.label]
            is_best = entry in on_front
            axes.errorbar(
                size,
                estimate.value,
                yerr=_whiskers([estimate]),
                color=colour,
                marker=marker,
                markersize=6.5 if is_best else 5,
                markerfacecolor=colour if is_best else "white",
                linestyle="none",
                linewidth=0.9,
                capsize=2,
                zorder=3 if is_best else 2,
            )
        axes.step(
            [p[0] for p in front],
            [p[1].value for p in front],
            where="post",
            color="0.6",
            linewidth=1.4,
            zorder=1,
        )
        _scale(axes, [p[0] for p in points], [p[1].value for p in points])
        full = next((_kilobytes(entry) for entry in entries if entry.is_full), None)
        there = "" if full is None else f"; the full cache takes {full:,.0f}"
        axes.set_xlabel(f"cache of one sequence, with overhead (kB{there})")
        axes.set_ylabel(_axis(metric, as_loss=as_loss))
        axes.set_title("Loss against bytes, and the Pareto front")
        _legend(figure, styles, "filled: on the front")
    return figure


def _panels(
    entries: Sequence[Entry], metrics: Sequence[MetricInfo], across: Any, label: str
) -> Figure:
    shown = [
        metric
        for metric in metrics
        if metric.better is not None
        and not metric.timing
        and any(metric.name in entry.findings for entry in entries)
    ]
    styles = _styles(entries)
    full = next((entry for entry in entries if entry.is_full), None)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.1 * len(shown) + 1.4, 3.1), layout="constrained")
        for number, metric in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), number + 1)
            as_loss = number == 0 and full is not None
            _draw(axes, entries, metric, styles, across, as_loss=as_loss)
            axes.set_xlabel(label)
            what = f"{metric.label}: difference to full" if as_loss else metric.label
            axes.set_title(what[:1].upper() + what[1:])
            arrow = {"lower": "↓ lower is better", "higher": "↑ higher is better"}
            axes.set_ylabel(arrow[metric.better or "lower"])
        _legend(figure, styles, "bars: 95% intervals")
    return figure


def _draw(
    axes: Axes,
    entries: Sequence[Entry],
    metric: MetricInfo,
    styles: dict[str, tuple[str, str, Any]],
    across: Any,
    *,
    as_loss: bool,
) -> None:
    every = []
    sizes = [across(entry) for entry in entries if not entry.is_full]
    # Entries of one budget stand beside each other, so that intervals don't hide one another: a
    # hundredth of the axis apart, which nobody takes for another budget.
    reach = max(max(sizes) / min(sizes), 1.02) if sizes else 1.0
    for turn, label in enumerate(styles):
        points = []
        for entry in entries:
            finding = entry.findings.get(metric.name)
            if entry.label != label or finding is None:
                continue
            if entry.is_full:
                if not as_loss:
                    value = finding.estimate.value
                    colour, _, line = styles[label]
                    axes.axhline(value, color=colour, linewidth=1, linestyle=line)
                    every.append(value)
                continue
            estimate = finding.difference if as_loss else finding.estimate
            if estimate is not None:
                points.append((across(entry), estimate))
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        colour, marker, line = styles[label]
        shift = reach ** (0.01 * (turn - (len(styles) - 1) / 2))
        axes.errorbar(
            [x * shift for x, _ in points],
            [estimate.value for _, estimate in points],
            yerr=_whiskers([estimate for _, estimate in points]),
            color=colour,
            marker=marker,
            markersize=4.5,
            markerfacecolor="white",
            linestyle=line,
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
        )
        every += [estimate.value for _, estimate in points]
    _scale(axes, sizes, every)
    full = next((styles[entry.label] for entry in entries if entry.is_full), None)
    if as_loss and full is not None and axes.get_yscale() == "linear":
        axes.axhline(0, color=full[0], linewidth=1, linestyle=full[2])


def _scale(axes: Axes, sizes: Sequence[float], values: Sequence[float]) -> None:
    """Logarithms where figures differ by more than a factor of eight; ticks where budgets are."""
    if values and min(values) > 0 and max(values) / min(values) > 8:
        axes.set_yscale("log")
        decades = np.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if sizes and max(sizes) / min(sizes) > 1.5:
        axes.set_xscale("log")
        ticks: list[float] = []
        for size in sorted(set(sizes)):  # those that leave room for the one before
            if not ticks or size / ticks[-1] > (max(sizes) / min(sizes)) ** 0.12:
                ticks.append(size)
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_tick_params(which="minor", size=0)


def _whiskers(estimates: Sequence[Estimate]) -> Any:
    """Lengths downwards and upwards, ``[2, n]``; None where an estimate has no interval."""
    if any(estimate.low is None or estimate.high is None for estimate in estimates):
        return None
    return np.array(
        [
            [max(0.0, e.value - (e.low or 0.0)) for e in estimates],
            [max(0.0, (e.high or 0.0) - e.value) for e in estimates],
        ]
    )


def _styles(entries: Sequence[Entry]) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of each label; the full cache is black."""
    labels = dict.fromkeys(entry.label for entry in entries if not entry.is_full)
    looks = zip(cycle(_COLOURS[:-1]), cycle(_MARKERS), cycle(_LINES), strict=False)
    styles = dict(zip(labels, looks, strict=False))
    for entry in entries:
        if entry.is_full:
            styles[entry.label] = ("#000000", "", (0, (1, 1)))
    return styles


def _legend(figure: Figure, styles: dict[str, tuple[str, str, Any]], remark: str) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            linestyle=line,
            label=label,
            markerfacecolor="white",
        )
        for label, (colour, marker, line) in styles.items()
    ]
    legend = figure.legend(
        handles=handles,
        loc="outside right upper",
        frameon=False,
        title=remark,
        handlelength=2.6,
        alignment="left",
    )
    legend.get_title().set_color("0.4")


def _axis(metric: MetricInfo, *, as_loss: bool) -> str:
    what = f"{metric.label}: difference to full" if as_loss else metric.label
    arrow = {"lower": "↓ lower is better", "higher": "↑ higher is better", None: ""}[metric.better]
    return f"{what[:1].upper()}{what[1:]}\n{arrow}"


def _tokens(entry: Entry) -> float:
    budgets = entry.cells[0].record.stats.budgets
    return sum(budgets) / len(budgets)


def _kilobytes(entry: Entry) -> float:
    stats = entry.cells[0].record.stats
    return (stats.bytes + stats.overhead_bytes) / 1000
