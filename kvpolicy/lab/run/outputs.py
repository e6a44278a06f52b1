"""Everything that is made from a run's finished cells: tables, plots, contact sheets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kvpolicy.lab.compare.comparison import Entry, compare
from kvpolicy.lab.compare.comparison_file import write_comparison
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.run_folder import RunFolder
from kvpolicy.lab.run.subject import MetricInfo
from kvpolicy.lab.show.pictures import contact_sheet, retention_sheet
from kvpolicy.lab.show.plots import pareto, quality_against_budget, quality_against_bytes
from kvpolicy.lab.show.retention import retention
from kvpolicy.lab.show.tables import latex_table, markdown_table, results_parquet, summary_csv
from kvpolicy.tracing.trace import Trace, load_trace

__all__ = ["image_sheets", "retention_sheets", "write_outputs"]

_COLUMNS = 10  # of a contact sheet


def write_outputs(run: RunFolder, metrics: Sequence[MetricInfo]) -> tuple[list[Entry], list[Path]]:
    """Write tables and plots into the run's folder, each whole or not at all.

    Args:
        run: with at least one finished cell.
        metrics: with their statistics, as the subject has them.

    Returns:
        What the cells say together, and the files.
    """
    cells = list(run.finished())
    entries = compare(cells, metrics)
    files: dict[str, str | bytes] = {
        "results.parquet": results_parquet(cells, metrics),
        "summary.csv": summary_csv(entries, metrics),
        "table.md": markdown_table(entries, metrics),
        "table.tex": latex_table(entries, metrics),
    }
    figures: dict[str, Figure] = {}
    judged = [metric for metric in metrics if metric.better is not None and not metric.timing]
    if judged and any(not entry.is_full for entry in entries):
        figures["quality-budget"] = quality_against_budget(entries, metrics)
        figures["quality-bytes"] = quality_against_bytes(entries, metrics)
        figures["pareto"] = pareto(entries, judged[0])
    main = judged[0] if judged else None
    figures |= image_sheets(entries, run.subject.class_names, main)
    figures |= retention_sheets(entries, main)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            file = io.BytesIO()
            # Without a date the same run gives the same file.
            figure.savefig(
                file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None
            )
            files[f"plots/{name}.{kind}"] = file.getvalue()
    (run.path / "plots").mkdir(exist_ok=True)
    for name, content in files.items():
        write_whole(run.path / name, content)
    write_comparison(run.path, entries)
    return entries, [run.path / name for name in files]


def image_sheets(
    entries: Sequence[Entry], class_names: Sequence[str], metric: MetricInfo | None
) -> dict[str, Figure]:
    """For each budget, what each policy drew, the full cache on top.

    Args:
        entries: of a comparison; none is drawn where they have several seeds, whose images differ.
        class_names: of the subject.
        metric: whose difference to the full cache stands beside each row; None for no remark.

    Returns:
        Figures by name; none for a subject that draws no images.
    """
    sheets = {}
    others = dict.fromkeys(entry.budget for entry in entries if not entry.is_full)
    # The full cache under another decoder stands beside every budget.
    for budget in [budget for budget in others if budget is not None] or others:
        rows, decoders = [], set()
        for entry in entries:
            if entry.budget not in (None, budget):
                continue
            images = entry.cells[0].images()
            if images is not None and len(images):
                rows.append((entry.label, _remark(entry, metric), images[:_COLUMNS]))
                decoders.add(entry.cells[0].cell.decoder)
        seeds = {entry.cells[0].cell.seed for entry in entries}
        if not rows or len(seeds) > 1:
            continue
        count = min(len(images) for _, _, images in rows)
        names = _columns(entries[0], class_names, count)
        at = "from the full cache" if budget is None else f"at a budget of {budget}"
        # Decoders use up chance in their own ways: one seed, other images.
        alike = ", same seed down each column" if len(decoders) == 1 else ""
        title = f"Drawn {at} (top: full cache){alike}"
        sheets[f"images-{_in_a_name(budget)}"] = contact_sheet(
            [(name, remark, list(images[:count])) for name, remark, images in rows],
            names,
            title,
        )
    return sheets


def _columns(entry: Entry, class_names: Sequence[str], count: int) -> list[str]:
    """What stands above the columns: the class of each image where it is known, or its number."""
    classes = entry.cells[0].scores().get("classes")
    if classes is None or len(classes) < count or not class_names:
        return [str(number) for number in range(count)]
    return [class_names[number] for number in classes[:count]]


def _remark(entry: Entry, metric: MetricInfo | None) -> str:
    if entry.is_full:
        return "full cache"
    finding = None if metric is None else entry.findings.get(metric.name)
    if metric is None or finding is None or finding.difference is None:
        return ""
    difference = finding.difference.value
    return f"{difference:+.{0 if abs(difference) >= 10 else 3}f} {metric.label}"


def retention_sheets(entries: Sequence[Entry], metric: MetricInfo | None) -> dict[str, Figure]:
    """For each budget, what each policy holds of the first traced image: over layers, over time.

    Args:
        entries: of a comparison; those that were not traced are left out.
        metric: whose difference to the full cache stands beside each row; None for no remark.

    Returns:
        Figures by name; none for a run without traces of images.
    """
    first = min(cell.cell.seed for entry in entries for cell in entry.cells)
    traces: dict[str, list[tuple[str, str, Trace]]] = {}
    for entry in entries:
        cell = entry.cells[0]
        if entry.budget and cell.cell.seed == first and cell.trace_path is not None:
            found = load_trace(cell.trace_path)
            if found.grid is not None and found.images is not None:
                row = (entry.label, _remark(entry, metric), found)
                traces.setdefault(entry.budget, []).append(row)
    figures = {}
    for budget, rows in traces.items():
        example = rows[0][2]
        assert example.grid is not None
        assert example.images is not None
        line = example.grid["cols"] + example.grid["line_break"]
        total = example.seen - example.grid["prefix"]
        moments = [round(example.grid["rows"] * share) * line for share in (0.5, 0.75, 1.0)]
        moments = [min(moment, total) for moment in moments]
        figures[f"retention-{_in_a_name(budget)}"] = retention_sheet(
            example.images[0].numpy(),
            [(label, remark, retention(found, moments)) for label, remark, found in rows],
            moments,
            f"Tokens still cached at a budget of {budget} ({total} image tokens)",
        )
    return figures


def _in_a_name(budget: str | None) -> str:
    return (budget or "all").replace("/", "_").replace(" ", "_")
