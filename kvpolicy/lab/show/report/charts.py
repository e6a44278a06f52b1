"""The report's interactive plots."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

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
    """Quality against the budget in tokens, and against the bytes of the cache, as HTML.

    Budgets may be spelled as shares, tokens or lines; what they come to in tokens is true for all.
    """

    def tokens_of(entry: Entry) -> float:
        tokens = entry.cells[0].record.stats.budgets
        return sum(tokens) / len(tokens)

    def megabytes_of(entry: Entry) -> float:
        return entry.cells[0].record.stats.bytes / 1e6

    return [
        _chart(entries, metric, tokens_of, "budget: tokens a head may hold, mean over layers"),
        _chart(entries, metric, megabytes_of, "cache of one sequence, MB"),
    ]


def _chart(
    entries: Sequence[Entry],
    metric: MetricInfo,
    place: Callable[[Entry], float],
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
        if not own:
            continue
        # By place alone: two spellings of a budget may come to the same.
        points = sorted(((place(entry), entry) for entry in own), key=lambda point: point[0])
        found = [_estimate(entry, metric, paired=paired) for _, entry in points]
        colour = _COLOURS[number % len(_COLOURS)]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[estimate.value for estimate in found],
            error_y={
                "array": [0 if e.high is None else e.high - e.value for e in found],
                "arrayminus": [0 if e.low is None else e.value - e.low for e in found],
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
