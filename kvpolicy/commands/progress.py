"""How a sweep goes: a bar for people, a line of JSON a cell for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvpolicy.lab.run.plan import BASELINE, Cell
from kvpolicy.lab.run.run_folder import CellRecord, Damaged, Failure
from kvpolicy.lab.run.subject import MetricInfo

__all__ = ["Bar", "Lines", "SweepProgress", "progress_for"]


class SweepProgress(AbstractContextManager["SweepProgress"]):
    """Counts cells, guesses the time that is left, and knows the best so far.

    Args:
        main: the metric by which the best is found; None where none is better than another.
        workers: cells at a time.
    """

    def __init__(self, main: MetricInfo | None, workers: int) -> None:
        self.main = main
        self.workers = workers
        self.total = self.count = 0
        self.failures: list[Failure] = []
        self._seconds: list[float] = []
        self._values: dict[tuple[str, str | None], list[float]] = {}

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None:
        """Learn how much there is to do, and how long finished cells took."""
        self.workers = max(1, min(self.workers, len(waiting)))
        self.total, self.count = len(waiting) + len(finished), len(finished)
        for record in finished:
            self._learn(record)

    def done(self, record: CellRecord) -> None:
        """Count a cell, and see whether it is the best so far."""
        self.count += 1
        self._learn(record)

    def damaged(self, item: Damaged) -> None:
        """Say which cell is measured again, and why."""
        name = f"{item.cell.label}, seed {item.cell.seed}"
        print(f"measured again: {name}: {item.reason}", file=sys.stderr)

    def failed(self, failure: Failure) -> None:
        """Keep a failure for the end, where failures are listed."""
        self.failures.append(failure)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lines are printed whole; there is nothing to put away."""

    @property
    def left(self) -> float | None:
        """Seconds that are left, from the mean of what has finished; None before that."""
        if not self._seconds:
            return None
        waiting = self.total - self.count - len(self.failures)
        return sum(self._seconds) / len(self._seconds) * waiting / self.workers

    @property
    def best(self) -> tuple[str, float] | None:
        """The best evicting policy so far, and its main figure."""
        if self.main is None or not self._values:
            return None
        sign = -1 if self.main.better == "higher" else 1
        means = {entry: sum(v) / len(v) for entry, v in self._values.items()}
        (label, budget), value = min(means.items(), key=lambda item: sign * item[1])
        return f"{label} at {budget}", value

    def _learn(self, record: CellRecord) -> None:
        self._seconds.append(record.seconds)
        if self.main and record.cell.policy != BASELINE and self.main.name in record.metrics:
            value = record.metrics[self.main.name]
            self._values.setdefault(record.cell.entry, []).append(value)


class Bar(SweepProgress):
    """One line that moves, on a terminal; failures stay above it."""

    def __init__(self, main: MetricInfo | None, workers: int, console: Console) -> None:
        super().__init__(main, workers)
        self._progress = Progress(
            TextColumn("cells"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[remark]}"),
            console=console,
        )
        self._task = self._progress.add_task("cells", total=None, remark="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar where it stands."""
        self._progress.stop()

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None:
        """Draw the bar, with what an earlier run has finished."""
        super().begun(waiting, finished)
        self._show()

    def done(self, record: CellRecord) -> None:
        """Move the bar, and say what the best is so far."""
        super().done(record)
        self._show()

    def failed(self, failure: Failure) -> None:
        """Say which cell failed, and why."""
        super().failed(failure)
        name = f"{failure.cell.label} at {failure.cell.budget or 'all'}, seed {failure.cell.seed}"
        self._progress.console.print(
            f"[red]failed:[/] {escape(name)}: {escape(failure.error)}", highlight=False
        )
        self._show()

    def _show(self) -> None:
        remark = []
        if self.failures:
            remark.append(f"[red]{len(self.failures)} failed[/]")
        if self.left is not None and self.count + len(self.failures) < self.total:
            remark.append(f"{spell_seconds(self.left)} left")
        if self.best is not None and self.main is not None:
            name, value = self.best
            remark.append(f"best: {escape(name)}, {value:.4f} {self.main.label}")
        self._progress.update(
            self._task, total=self.total, completed=self.count, remark=" · ".join(remark)
        )


class Lines(SweepProgress):
    """One JSON object a line and a cell, for logs and programs."""

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None:
        """Say how much there is to do."""
        super().begun(waiting, finished)
        self._print(event="begun", waiting=len(waiting))

    def done(self, record: CellRecord) -> None:
        """Say what the cell's figures are."""
        super().done(record)
        self._print(event="done", cell=record.id, seconds=record.seconds, metrics=record.metrics)

    def failed(self, failure: Failure) -> None:
        """Say which cell failed, and why."""
        super().failed(failure)
        self._print(event="failed", cell=failure.id, error=failure.error)

    def _print(self, **about: Any) -> None:
        line = {
            "time": round(time.time(), 3),
            **about,
            "finished": self.count,
            "failed_cells": len(self.failures),
            "total": self.total,
            "seconds_left": None if self.left is None else round(self.left),
        }
        print(json.dumps(line), file=sys.stdout, flush=True)


def progress_for(main: MetricInfo | None, workers: int, console: Console) -> SweepProgress:
    """A bar on a terminal, lines elsewhere."""
    return Bar(main, workers, console) if console.is_terminal else Lines(main, workers)


def spell_seconds(seconds: float) -> str:
    """A time as people say it: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
