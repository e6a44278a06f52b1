"""The report's interactive plots."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from kvpolicy.budget.budget import Budget
from kvpolicy.lab.compare.comparison import Entry, Estimate
from kvpolicy.lab.run.subject import MetricInfo

__all__ = ["charts", "library"]

#: Okabe and Ito's palette, which the colour-blind can tell apart, and marks for those who print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8a7a00")
_MARKS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot")


def library() -> str:
    """The plotting library, to be embedded once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def charts(entries: Sequence[Entry], metric: MetricInfo) -> list[str]:
    """Quality against the budget, and against the bytes of the cache, as HTML."""

    def budget_of(entry: Entry) -> float | None:
        parsed = None if entry.budget is None else Budget.parse(entry.budget)
        if parsed is not None and parsed.kind == "fraction":
            return float(parsed.amount)
        tokens = entry.cells[0].record.stats.budgets
        return sum(tokens) / len(tokens)

    def bytes_of(entry: Entry) -> float:
        return entry.cells[0].record.stats.bytes / 1e6

    fractions = all(e.is_full or "/" in (e.budget or "") for e in entries)
    kind = "share of the cache" if fractions else "tokens a head may hold"
    return [
        _chart(entries, metric, budget_of, f"budget: {kind}"),
        _chart(entries, metric, bytes_of, "cache of one sequence, MB"),
    ]


def _chart(
    entries: Sequence[Entry],
    metric: MetricInfo,
    place: Callable[[Entry], float | None],
    title: str,
) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    evicting = [entry for entry in entries if not entry.is_full and metric.name in entry.findings]
    # On the same items, a difference has a far smaller interval than either figure.
    paired = all(entry.findings[metric.name].difference is not None for entry in evicting)
    labels = list(dict.fromkeys(entry.label for entry in entries if not entry.is_full))
    for number, label in enumerate(labels):
        own = [e for e in entries if e.label == label and metric.name in e.findings]
        points = sorted((x, e) for e in own if (x := place(e)) is not None)
        if not points:
            continue
        found = [_estimate(entry, metric, paired=paired) for _, entry in points]
        colour = _COLOURS[number % len(_COLOURS)]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[estimate.value for estimate in found],
            error_y={
                "array": [(e.high or e.value) - e.value for e in found],
                "arrayminus": [e.value - (e.low or e.value) for e in found],
                "thickness": 1.2,
                "width": 4,
            },
            mode="lines+markers",
            # Plotly reads names as its own markup.
            name=html.escape(label),
            text=[html.escape(entry.budget or "all") for _, entry in points],
            hovertemplate="%{text}: %{y:.4f}<extra>%{fullData.name}</extra>",
            line={"color": colour, "dash": _DASHES[number // len(_COLOURS) % len(_DASHES)]},
            marker={"symbol": _MARKS[number % len(_MARKS)], "size": 9},
        )
    full = next((e for e in entries if e.is_full and metric.name in e.findings), None)
    if full is not None:
        value = full.findings[metric.name].estimate.value
        figure.add_hline(
            y=0 if paired else value, line={"color": "#555", "dash": "dash", "width": 1.2},
            annotation={"text": f"full cache: {value:.4f}", "font": {"size": 12}},
            annotation_position="top right",
        )  # fmt: skip
    figure.update_layout(
        template="simple_white",
        height=360,
        margin={"l": 64, "r": 16, "t": 16, "b": 52},
        legend={"orientation": "h", "y": 1.12, "x": 0, "font": {"size": 12}},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        xaxis={"title": title, "gridcolor": "#e8ecef", "showgrid": True},
        yaxis={
            "title": html.escape(metric.label + paired * ", more than full"),
            "gridcolor": "#e8ecef",
            "showgrid": True,
        },
    )
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config={"displaylogo": False, "responsive": True},
        )
    )


def _estimate(entry: Entry, metric: MetricInfo, *, paired: bool) -> Estimate:
    """The difference to the full cache, or the figure itself."""
    finding = entry.findings[metric.name]
    return finding.difference if paired and finding.difference is not None else finding.estimate
