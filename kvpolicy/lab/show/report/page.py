"""The page: a run's table, plots, pictures and decisions in one file that needs no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpolicy.errors import ParameterError
from kvpolicy.lab.compare.comparison import Entry, Estimate, Finding, compare
from kvpolicy.lab.compare.comparison_file import read_comparison
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.provenance import differences
from kvpolicy.lab.run.run_folder import FinishedCell, RunFolder
from kvpolicy.lab.run.subject import MetricInfo
from kvpolicy.lab.show.report.charts import charts, library
from kvpolicy.lab.show.report.viewer import LONGEST, viewer_data
from kvpolicy.tracing.trace import load_trace

__all__ = ["report_on_run", "report_on_trace"]

_PICTURES = 10  # drawn images of each row of the contact sheet
#: What a page carries of pictures, and of traces (their files' size; the viewer needs less).
_SHEET_BYTES, _TRACE_BYTES = 1_000_000, 16_000_000


def report_on_run(run: RunFolder, out: Path) -> None:
    """Write the report of a run, from what lies in its folder alone.

    Args:
        run: an ablation's folder, finished or not.
        out: the HTML file.

    Raises:
        ParameterError: no cell has finished, or a file that says what was measured is damaged.
        OSError: the file can't be written.
    """
    cells = list(run.finished())
    damaged = run.damaged()
    if not cells:
        reason = f"; {damaged[0].reason}" if damaged else ""
        raise ParameterError(f"{run.path} holds no finished cell to report on{reason}")
    measured = {name for cell in cells for name in cell.record.metrics}
    subject = run.subject
    shown = [metric for metric in subject.metrics if metric.name in measured]
    if not shown:
        raise ParameterError(f"{run.path}: subject.json names no metric that was measured")
    remarks = [f"{item.cell.label}: {item.reason}" for item in damaged]
    entries = read_comparison(run.path, cells)
    if entries is None:
        entries = compare(cells, shown)
        remarks.append(
            "the run has not come to its end: figures that only the subject can compute (a Fréchet "
            "distance, say) are means over seeds without an interval until kvpolicy ablate has "
            "gone on"
        )
    remarks += _mixture(cells)
    main = next((metric for metric in shown if metric.better is not None), shown[0])
    plotted = charts(entries, main)
    sheet, unseen = _sheet(entries)
    traces, untold = _traces(cells)
    for count, what in ((unseen, "rows of drawn images"), (untold, "traces")):
        if count:
            remarks.append(f"{count} {what} are left out, so that this page stays small")
    _write(
        out,
        title=f"{subject.name}: policies compared",
        subject=subject,
        environment=run.environment,
        plan=run.plan.text(),
        columns=[_column(metric) for metric in shown],
        rows=[_row(entry, shown) for entry in entries],
        charts=plotted,
        plotly=library() if plotted else "",
        sheet=sheet,
        class_names=_asked_for(entries, subject.class_names),
        failures=run.failures(),
        left_out=subject.left_out,
        remarks=remarks,
        traces=traces,
    )


def report_on_trace(path: Path, out: Path) -> None:
    """Write a report that is the viewer of one trace.

    Raises:
        ParameterError: the file is no trace, or not one of an image.
        OSError: the report can't be written.
    """
    found = load_trace(path)
    tokens = sum(found.budgets) / max(1, len(found.budgets))
    data = viewer_data(found, found.policy, f"{tokens:g} tokens")
    if data is None:
        why = "has no grid that the viewer could show"
        if found.grid is not None:
            why = f"is longer than the viewer can show: {LONGEST - 1:,} tokens"
        raise ParameterError(f"{path} is a trace of {found.layout}, which {why}")
    _write(out, title=f"{found.policy}: what is cached", traces=[data])


def _write(out: Path, **context: Any) -> None:
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("kvpolicy.lab.show.report")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    jinja.filters["json"] = _json
    names = ("subject", "environment", "plan", "columns", "rows", "charts", "plotly", "sheet")
    others = ("class_names", "failures", "left_out", "remarks")
    template = jinja.from_string(folder.joinpath("report.html").read_text(encoding="utf-8"))
    text = template.render(
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        script=folder.joinpath("report.js").read_text(encoding="utf-8"),
        **dict.fromkeys((*names, *others)) | context,
    )
    write_whole(out, text)


def _json(value: Any) -> Any:
    """JSON that no string in it can end the script element of."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _column(metric: MetricInfo) -> dict[str, str]:
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[metric.better]
    return {"label": metric.label + arrow, "about": metric.about}


def _row(entry: Entry, metrics: Sequence[MetricInfo]) -> dict[str, Any]:
    return {
        "label": entry.label,
        "budget": entry.budget or "all",
        "order": sum(entry.cells[0].record.stats.budgets),
        "seeds": len(entry.cells),
        "cells": [_figure(entry.findings.get(metric.name), metric) for metric in metrics],
    }


def _figure(finding: Finding | None, metric: MetricInfo) -> dict[str, Any] | None:
    if finding is None:
        return None
    difference = finding.difference
    return {
        "value": finding.estimate.value,
        "text": _spell(finding.estimate.value),
        "interval": _interval(finding.estimate),
        "difference": "" if difference is None else f"{difference.value:+.4g}",
        "difference_interval": "" if difference is None else _interval(difference),
        "sure": finding.clear,
    }


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{_spell(estimate.low)} … {_spell(estimate.high)}"


def _spell(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _mixture(cells: Sequence[FinishedCell]) -> list[str]:
    """Say which cells were not measured with what most were measured with."""
    about = [cell.record.made_by for cell in cells]
    keys = [
        None
        if made is None
        else (made.threads, *sorted(made.versions.items()), made.code.get("kvpolicy"))
        for made in about
    ]
    if len(set(keys)) < 2:
        return []
    usual = max(set(keys), key=keys.count)
    most = about[keys.index(usual)]
    found: dict[str, int] = {}
    for key, made in zip(keys, about, strict=True):
        if key != usual:
            words = "; ".join(differences(made, most)) if most is not None else "known"
            found[words] = found.get(words, 0) + 1
    return [
        f"{count} of {len(cells)} cells were measured otherwise than the rest (here, against it): "
        f"{words}"
        for words, count in found.items()
    ]


def _sheet(entries: Sequence[Entry]) -> tuple[list[dict[str, Any]], int]:
    """Drawn images, a row for each policy and budget, the same seeds down each column.

    Returns:
        As many rows as a page can carry, and how many there are beyond.
    """
    rows: list[dict[str, Any]] = []
    size = left = 0
    for entry in entries:
        if size > _SHEET_BYTES:
            left += (entry.cells[0].folder / "images.safetensors").exists()
            continue
        images = entry.cells[0].images()
        if images is not None:
            pictures = [_png(image) for image in images[:_PICTURES]]
            size += sum(map(len, pictures))
            rows.append(
                {"label": entry.label, "budget": entry.budget or "all", "pictures": pictures}
            )
    return rows, left


def _asked_for(entries: Sequence[Entry], class_names: Sequence[str]) -> Sequence[str]:
    """What stands above the columns: the class of each picture; classes in turn if none is said."""
    classes = entries[0].cells[0].scores().get("classes") if class_names else None
    if classes is None:
        return class_names[:_PICTURES]
    return [class_names[number] for number in classes[:_PICTURES]]


def _png(image: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _traces(cells: Sequence[FinishedCell]) -> tuple[list[dict[str, Any]], int]:
    """The traces of the first seed; other seeds look at other images.

    Returns:
        As many as a page can carry, and how many there are beyond.
    """
    first = min(cell.cell.seed for cell in cells)
    found = []
    size = left = 0
    for cell in cells:
        if cell.cell.seed == first and cell.trace_path is not None:
            if size > _TRACE_BYTES:
                left += 1
                continue
            size += cell.trace_path.stat().st_size
            data = viewer_data(
                load_trace(cell.trace_path), cell.cell.label, cell.cell.budget or "all"
            )
            if data is not None:
                found.append(data)
    return found, left
