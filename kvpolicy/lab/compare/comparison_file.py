"""``comparison.json``: what a run's cells say together, for readers that have no statistics.

A metric's statistic is code of its subject's. Whoever only reads a run (a report) imports nothing
of it, and takes intervals from this file, as long as it was made from the cells that are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from kvpolicy.lab.compare.comparison import Entry, Finding
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.run_folder import FinishedCell

__all__ = ["read_comparison", "write_comparison"]

_NAME = "comparison.json"
_FINDINGS = TypeAdapter(dict[str, Finding])


def write_comparison(run: Path, entries: Sequence[Entry]) -> None:
    """Keep a comparison in the folder of its run, whole or not at all."""
    content = [
        {
            "cells": {cell.record.id: _digest(cell) for cell in entry.cells},
            "findings": {name: asdict(finding) for name, finding in entry.findings.items()},
        }
        for entry in entries
    ]
    write_whole(run / _NAME, json.dumps(content) + "\n")


def read_comparison(run: Path, cells: Sequence[FinishedCell]) -> list[Entry] | None:
    """The comparison of these cells; None where there is none, or it is of others."""
    try:
        content = json.loads((run / _NAME).read_bytes())
        by_id = {cell.record.id: cell for cell in cells}
        if {name for entry in content for name in entry["cells"]} != set(by_id):
            return None
        entries = []
        for entry in content:
            own = tuple(by_id[name] for name in entry["cells"])
            if [_digest(cell) for cell in own] != list(entry["cells"].values()):
                return None
            findings = _FINDINGS.validate_python(entry["findings"])
            entries.append(Entry(*own[0].cell.entry, own, findings))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        return None
    return entries


def _digest(cell: FinishedCell) -> str:
    return hashlib.sha256((cell.folder / "cell.json").read_bytes()).hexdigest()
