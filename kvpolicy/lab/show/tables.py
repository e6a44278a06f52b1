"""Tables of a run: a row a cell for machines, a row a policy and budget for a paper."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from kvpolicy.lab.compare.comparison import Entry, Estimate, Finding
from kvpolicy.lab.run.run_folder import FinishedCell
from kvpolicy.lab.run.subject import MetricInfo

__all__ = ["latex_table", "markdown_table", "results_parquet", "summary_csv"]

#: What each column of results.parquet holds, besides one for each metric.
COLUMNS = {
    "cell": "name of the cell's folder",
    "subject": "what the policy was tried on",
    "policy": "name of the policy",
    "label": "policy with the parameters that the plan set, and its decoder",
    "decoder": "what drew tokens",
    "parameters": "all parameters of the policy, defaults included, as JSON",
    "budget": "as the plan has it; null for the full cache",
    "budget_tokens": "evictable tokens a head may hold, mean over layers",
    "seed": "of the subject",
    "overhead_bytes": "positions and observers beside the cache, for one sequence",
    "evictions": "tokens that a head lost, mean over layers",
    "seconds": "that the cell took",
}


def results_parquet(cells: Sequence[FinishedCell], metrics: Sequence[MetricInfo]) -> bytes:
    """A Parquet file with one row a cell; each column says in its metadata what it holds."""
    import pyarrow as pa
    from pyarrow import parquet

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    kinds: dict[str, Any] = dict.fromkeys(COLUMNS, text) | {
        "seed": whole,
        "overhead_bytes": whole,
        "budget_tokens": real,
        "evictions": real,
        "seconds": real,
    }
    about = dict(COLUMNS)
    for metric in metrics:
        kinds[metric.name] = real
        better = f"; {metric.better} is better" if metric.better else ""
        about[metric.name] = f"{metric.label}: {metric.about}{better}"
    schema = pa.schema(
        [pa.field(name, kind, metadata={"about": about[name]}) for name, kind in kinds.items()]
    )
    rows = [_row(cell) for cell in cells]
    table = pa.Table.from_pylist(rows, schema=schema)
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def _row(cell: FinishedCell) -> dict[str, Any]:
    record, stats = cell.record, cell.record.stats
    return {
        "cell": record.id,
        "subject": record.cell.subject,
        "policy": record.cell.policy,
        "label": record.cell.label,
        "decoder": record.cell.decoder,
        "parameters": json.dumps(record.parameters, sort_keys=True),
        "budget": record.cell.budget,
        "budget_tokens": sum(stats.budgets) / len(stats.budgets),
        "seed": record.cell.seed,
        "overhead_bytes": stats.overhead_bytes,
        "evictions": sum(stats.evictions) / len(stats.evictions),
        "seconds": record.seconds,
        **record.metrics,
    }


def summary_csv(entries: Sequence[Entry], metrics: Sequence[MetricInfo]) -> str:
    """A row a policy and budget: every metric with its interval and its difference to full."""
    file = io.StringIO()
    names = ["policy", "label", "budget", "seeds"]
    for metric in metrics:
        names += [metric.name, f"{metric.name}_low", f"{metric.name}_high"]
        if metric.better is not None:
            names += [
                f"{metric.name}_{part}"
                for part in ("delta", "delta_low", "delta_high", "p", "clear")
            ]
    writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
    writer.writeheader()
    for entry in entries:
        row: dict[str, Any] = {
            "policy": entry.policy,
            "label": entry.label,
            "budget": entry.budget or "",
            "seeds": len(entry.cells),
        }
        for name, finding in entry.findings.items():
            row |= _columns(name, finding.estimate)
            if finding.difference is not None:
                row |= _columns(f"{name}_delta", finding.difference)
            if finding.p is not None:
                row |= {f"{name}_p": finding.p, f"{name}_clear": int(finding.clear)}
        writer.writerow(
            {key: repr(v) if isinstance(v, float) else _plain(v) for key, v in row.items()}
        )
    return file.getvalue()


def _columns(name: str, estimate: Estimate) -> dict[str, Any]:
    return {
        name: estimate.value,
        f"{name}_low": "" if estimate.low is None else estimate.low,
        f"{name}_high": "" if estimate.high is None else estimate.high,
    }


def _plain(value: Any) -> Any:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def markdown_table(entries: Sequence[Entry], metrics: Sequence[MetricInfo]) -> str:
    """A table for a page: differences to full with intervals, the best of each budget in bold."""

    def escape(text: str) -> str:
        for mark in "\\|*_<>`":
            text = text.replace(mark, "\\" + mark)
        return text

    heads, rows = _cells(entries, metrics, escape, lambda text: f"**{text}**", "…", "−")
    lines = [
        f"| {' | '.join(heads)} |",
        f"| {' | '.join(['---', '---'] + ['---:'] * (len(heads) - 2))} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n\n" + _caption(entries, metrics, str) + "\n"


def latex_table(entries: Sequence[Entry], metrics: Sequence[MetricInfo]) -> str:
    """The same table for a paper; it needs the package ``booktabs``."""
    marks = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "é": r"\'e",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "Δ": r"$\Delta$",
        **{mark: "\\" + mark for mark in "&%$#_{}"},
    }

    def escape(text: str) -> str:
        return "".join(marks.get(letter, letter) for letter in text)

    heads, rows = _cells(
        entries, metrics, escape, lambda text: rf"\textbf{{{text}}}", r"\,\ldots\,", "$-$"
    )
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{_caption(entries, metrics, escape)}}}",
        rf"\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
    ]
    before: object = entries
    for entry, row in zip(_by_budget(entries), rows, strict=True):
        if entry.budget != before:
            lines.append(r"\midrule")
        before = entry.budget
        lines.append(" & ".join(row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    text = "\n".join(lines) + "\n"
    return text.replace("†", r"$^{\dagger}$").replace("–", "--").replace(" ± ", r"\,$\pm$\,")


def _caption(
    entries: Sequence[Entry], metrics: Sequence[MetricInfo], escape: Callable[[str], str]
) -> str:
    counts = []
    for metric in metrics:
        found = {
            entry.findings[metric.name].items for entry in entries if metric.name in entry.findings
        }
        numbers = sorted(number for number in found if number is not None)
        if numbers:
            most = "" if len(numbers) == 1 else f" to {numbers[-1]}"
            counts.append(f"{metric.label} from {numbers[0]}{most} items")
    items = f" A row's {', '.join(counts)}." if counts else ""
    return escape(
        "Δ: difference to the full cache on the same items, with its 95% interval (paired "
        "bootstrap); ±: half of a 95% interval. †: not noise (p < 0.05 after Holm's correction). "
        f"Bold: the best at this budget. ↓, ↑: lower, higher is better.{items}"
    )


def _by_budget(entries: Sequence[Entry]) -> list[Entry]:
    """The full cache, then the largest cache first, and inside a budget in the plan's order."""

    def size(entry: Entry) -> float:
        stats = entry.cells[0].record.stats
        return 0.0 if entry.is_full else -sum(stats.budgets)

    return sorted(entries, key=lambda entry: (not entry.is_full, size(entry), entry.budget or ""))


def _cells(
    entries: Sequence[Entry],
    metrics: Sequence[MetricInfo],
    escape: Callable[[str], str],
    bold: Callable[[str], str],
    to: str,
    minus: str,
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: the main metric as a difference, others as they are with a mark."""
    shown = [metric for metric in metrics if any(metric.name in e.findings for e in entries)]
    main = shown[0] if shown and shown[0].better else None
    heads = ["budget", "policy"]
    for metric in shown:
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[metric.better]
        heads.append(escape(metric.label + arrow))
        if metric is main:
            heads.append(escape("Δ to full"))
    ordered = _by_budget(entries)
    best = {
        (entry.budget, metric.name): _best(
            [e for e in ordered if e.budget == entry.budget and not e.is_full], metric
        )
        for entry in ordered
        for metric in shown
    }
    rows = []
    for entry in ordered:
        row = [escape(entry.budget or "all"), escape(entry.label)]
        for metric in shown:
            finding = entry.findings.get(metric.name)
            if finding is None:
                row += ["–"] * (2 if metric is main else 1)
                continue
            text = _figure(finding.estimate, metric)
            if metric is not main and finding.clear:
                text += "†"
            top = best[entry.budget, metric.name] == entry.label
            row.append(bold(text) if top else text)
            if metric is main:
                row.append(_difference(finding, to))
        rows.append([cell.replace("-", minus) if n > 1 else cell for n, cell in enumerate(row)])
    return heads, rows


def _best(entries: Sequence[Entry], metric: MetricInfo) -> str | None:
    have = [entry for entry in entries if metric.name in entry.findings]
    if metric.better is None or metric.timing or len(have) < 2:
        return None
    sign = 1 if metric.better == "lower" else -1
    return min(have, key=lambda e: sign * e.findings[metric.name].estimate.value).label


def _difference(finding: Finding, to: str) -> str:
    difference = finding.difference
    if difference is None:
        return "–"
    text = f"{difference.value:+.4f}"
    if difference.low is not None and difference.high is not None:
        text += f" ({difference.low:+.4f}{to}{difference.high:+.4f})"
    return text + ("†" if finding.clear else "")


def _figure(estimate: Estimate, metric: MetricInfo) -> str:
    """A figure with as many digits as its size asks for, and half of its interval."""
    if metric.better is None:
        return f"{estimate.value:,.0f}"
    limits = ((1000, 0), (100, 1), (10, 2), (0, 3))
    digits = next(digits for limit, digits in limits if abs(estimate.value) >= limit)
    text = f"{estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None or metric.timing:
        return text
    return f"{text} ± {(estimate.high - estimate.low) / 2:.{digits}f}"
