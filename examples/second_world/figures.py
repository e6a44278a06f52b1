"""Figures of finished parts, as numbers and as tables of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.run.run_folder import FinishedCell, RunFolder
from second_world.parts import BUDGETS, WORLDS, Part

__all__ = ["figures_of", "page"]

#: A mean with its 95% interval; of one number, that number.
Span = list[float]
Figures = Mapping[str, Any]
#: Of a world's part, the one whose pictures are drawn from the same distribution.
PASSES = {"clipart": "passes", "clipart-guided": "passes-guided"}
#: What was found on fashion-ar: that the first loses less than the second.
CLAIMS = (
    ("linear", "rkv"),
    ("rkv", "h2o"),
    ("h2o", "streaming_llm"),
    ("linear", "h2o"),
    ("linear", "streaming_llm"),
    ("linear2d", "linear"),
    ("h2o", "random"),
    ("streaming_llm", "random"),
)


def figures_of(part: Part, run: RunFolder) -> dict[str, Any]:
    """Of each policy and budget: the figure, the extra to the full cache, and to every other.

    Args:
        part: what it is.
        run: its folder; cells that have not finished are left out.

    Returns:
        ``about``, ``metric``, ``items``, and ``rows``: ``policy``, ``budget``, ``value``,
        ``seconds``, ``extra`` (to the full cache) and ``less`` (by policy: how much less extra than
        that one at the same budget), all with intervals of the paired bootstrap over items.
    """
    cells = list(run.finished())
    array = {"bits_per_code": "bits", "bits_per_pixel": "bits", "bits_per_byte": "bits"}
    name = array.get(part.metric, part.metric.removesuffix("_per_code"))
    values = {cell.cell.entry: _array(cell, name) for cell in cells}
    full = next((values[cell.cell.entry] for cell in cells if cell.cell.is_baseline), None)
    rows = []
    for cell in cells:
        own = values[cell.cell.entry]
        row: dict[str, Any] = {
            "policy": _short(cell.cell.label),
            "budget": cell.cell.budget,
            "value": _span(own),
            "seconds": round(cell.record.seconds, 1),
        }
        if full is not None and not cell.cell.is_baseline:
            row["extra"] = _span(own - full)
            row["less"] = {
                _short(label): _span(other - own)
                for (label, budget), other in values.items()
                if budget == cell.cell.budget and label != cell.cell.label
            }
        rows.append(row)
    return {
        "about": part.about,
        "metric": part.metric,
        "items": len(next(iter(values.values()), [])),
        "rows": rows,
    }


def page(found: Mapping[str, Figures]) -> str:
    """All tables, what carried over first."""
    tables = [_carried(found)] if any(name in found for name in WORLDS) else []
    for name, part in found.items():
        if part["metric"] == "passes":
            tables.append(_passes(part))
        elif name.startswith("knobs") or name == "halves":
            tables.append(_against_linear(part))
        else:
            tables.append(_ordering(part))
    return "\n\n".join(tables) + "\n"


def _ordering(part: Figures) -> str:
    rows = {(row["policy"], row["budget"]): row for row in part["rows"]}
    full = next((row for row in part["rows"] if row["budget"] is None), None)
    lines = [f"### {part['about']}", ""]
    if full is not None:
        lines += [
            f"{_unit(part)} over the full cache's {full['value'][0]:.4f}, {part['items']} items.",
            "",
        ]
    budgets = list(dict.fromkeys(row["budget"] for row in part["rows"] if row["budget"]))
    lines += [f"| policy | {' | '.join(budgets)} |", "| --- |" + " --: |" * len(budgets)]
    for policy in dict.fromkeys(policy for policy, budget in rows if budget):
        told = [_told(rows.get((policy, budget), {}).get("extra")) for budget in budgets]
        lines.append(f"| `{policy}` | {' | '.join(told)} |")
    return "\n".join(lines)


def _against_linear(part: Figures) -> str:
    lines = [
        f"### {part['about']}",
        "",
        f"{_unit(part)}, {part['items']} items.",
        "",
        "| policy | budget | over the full cache | over `linear` | fewer extra bits |",
        "| --- | --- | --: | --: | --: |",
    ]
    linear = {row["budget"]: row for row in part["rows"] if row["policy"] == "linear"}
    for row in sorted(part["rows"], key=lambda row: row["budget"] or ""):
        if row["budget"] is None:
            continue
        less = row["less"].get("linear")
        over = None if less is None else [-less[0], *(-end for end in reversed(less[1:]))]
        base = linear.get(row["budget"])
        share = "" if less is None or base is None else _share(less, base["extra"][0])
        told = (f"`{row['policy']}`", row["budget"], _told(row["extra"]), _told(over), share)
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def _passes(part: Figures) -> str:
    lines = [
        f"### {part['about']}",
        "",
        f"{part['items']} pictures, one at a time, 1/6 of the cache.",
        "",
        "| drawn by | passes a picture | times fewer | seconds a picture |",
        "| --- | --: | --: | --: |",
    ]
    full = next((row["value"][0] for row in part["rows"] if row["budget"] is None), None)
    for row in part["rows"]:
        count = row["value"][0]
        fewer = "" if full is None else f"{full / count:.1f}"
        seconds = row["seconds"] / max(1, part["items"])
        lines.append(f"| `{row['policy']}` | {count:.0f} | {fewer} | {seconds:.1f} |")
    return "\n".join(lines)


def _carried(found: Mapping[str, Figures]) -> str:
    """What one loses less than another, in bits, at 1/6 (text: 1/6 of its tokens)."""
    worlds = [name for name in WORLDS if name in found]
    lines = [
        "### What carried over",
        "",
        "Bits by which the first loses less than the second at 1/6, and whether it does: yes or no "
        "where the interval says so.",
        "",
        f"| | {' | '.join(WORLDS[name] for name in worlds)} |",
        "| --- |" + " --- |" * len(worlds),
    ]
    for one, other in CLAIMS:
        told = []
        for name in worlds:
            rows = {(r["policy"], r["budget"]): r for r in found[name]["rows"]}
            less = rows.get((one, "1/6"), {}).get("less", {}).get(other)
            told.append("" if less is None else f"{_verdict(less)}: {_told(less)}")
        lines.append(f"| `{one}` before `{other}` | {' | '.join(told)} |")
    drawn = [found.get(PASSES.get(name, "")) for name in worlds]
    told = ["" if part is None else _fewest(part) for part in drawn]
    lines.append(f"| times fewer passes of `linear`, speculating | {' | '.join(told)} |")
    for budget in BUDGETS:
        told = []
        for name in worlds:
            rows = {(r["policy"], r["budget"]): r for r in found[name]["rows"]}
            base, own = rows.get(("linear", budget)), rows.get(("linear2d", budget))
            told.append(
                "" if not base or not own else _share(own["less"]["linear"], base["extra"][0])
            )
        lines.append(
            f"| fewer extra bits of `linear2d` than `linear`, {budget} | {' | '.join(told)} |"
        )
    return "\n".join(lines)


def _fewest(part: Figures) -> str:
    """What the best decoder saves."""
    full = next((row["value"][0] for row in part["rows"] if row["budget"] is None), None)
    others = [row for row in part["rows"] if row["budget"] is not None]
    if full is None or not others:
        return ""
    best = min(others, key=lambda row: row["value"][0])
    return f"{full / best['value'][0]:.1f} (`{best['policy'].partition('@')[2]}`)"


def _array(cell: FinishedCell, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return cell.scores()[name].astype(np.float64)


def _span(values: np.ndarray[Any, np.dtype[np.float64]]) -> Span:
    if len(values) < 2:
        return [float(values.mean())]
    return [round(end, 6) for end in paired_bootstrap(values)]


def _short(label: str) -> str:
    return label.removeprefix("second_world.halves:")


def _unit(part: Figures) -> str:
    return part["metric"].replace("guided_", "").replace("_", " ").capitalize()


def _told(span: Span | None) -> str:
    if span is None:
        return ""
    ends = f" ({span[1]:+.4f} to {span[2]:+.4f})" if len(span) == 3 else ""
    return f"{span[0]:+.4f}{ends}"


def _share(less: Sequence[float], of: float) -> str:
    if of <= 0:
        return ""
    ends = f" ({less[1] / of:.0%} to {less[2] / of:.0%})" if len(less) == 3 else ""
    return f"{less[0] / of:.0%}{ends}"


def _verdict(less: Sequence[float]) -> str:
    if len(less) == 3 and less[1] > 0:
        return "yes"
    if len(less) == 3 and less[2] < 0:
        return "no"
    return "not clear"
