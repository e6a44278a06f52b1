"""The report: tables to paste into an issue, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpolicy.lab.run.files import write_whole
from kvpolicy_adapters.bench.gpu.part import Outcome, Setting

__all__ = ["markdown", "write_json"]


def markdown(outcomes: Sequence[Outcome], command: str, *, tiny: bool) -> str:
    """A table a part, under what has become of it."""
    lines = [f"```console\n$ {command}\n```", ""]
    if tiny:
        lines += [
            "All of it was made tiny, with shapes that are no model's: no time means anything.",
            "",
        ]
    for outcome in outcomes:
        state = outcome.state if outcome.good or outcome.state != "done" else "done, and wrong"
        error = f": {outcome.error}" if outcome.error else ""
        lines += [f"**{outcome.part}** ({state}, {outcome.seconds:.0f} s){error}", ""]
        rows = list(outcome.findings.values())
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row.figures))
            wrong = any(row.wrong for row in rows)
            lines.append(_row(["", *columns, *(["wrong"] if wrong else [])]))
            lines.append(_row(["---", *["---:"] * (len(columns) + wrong)]))
            for row in rows:
                cells = [_cell(row.figures.get(name, "-")) for name in columns]
                lines.append(_row([row.what, *cells, *([row.wrong] if wrong else [])]))
            lines.append("")
    return "\n".join(lines)


def write_json(
    path: Path, outcomes: Sequence[Outcome], setting: Setting, command: str, seconds: float
) -> None:
    """Everything, whole or not at all.

    Raises:
        OSError: the file can't be written.
    """
    content: dict[str, Any] = {
        "command": command,
        "device": setting.device,
        "tiny": setting.tiny,
        "dtype": setting.dtype,
        "seconds": seconds,
        "parts": [
            {**asdict(each), "good": each.good, "findings": list(asdict(each)["findings"].values())}
            for each in outcomes
        ],
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _cell(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
