"""What the runner asks of whatever measures cells for it.

An executor takes tasks and gives each back with its outcome, in the order in which they end. It
writes nothing: whoever reads the outcomes does, so that a worker needs no disk in common with it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, TypeAlias

from kvpolicy.lab.run.worker import Outcome, Task

__all__ = ["DEATHS", "Executor", "Outcomes"]

#: Tasks with their outcomes; ``close()`` ends the workers.
Outcomes: TypeAlias = Generator[tuple[Task, Outcome], None, None]
#: How often a task may kill its worker before it counts as failed.
DEATHS = 3


class Executor(Protocol):
    """What the runner asks of an executor."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def workers(self) -> int:
        """Cells that are measured at a time."""

    def run(self, tasks: Sequence[Task]) -> Outcomes:
        """Measure every task; closing the iterator ends the workers."""
