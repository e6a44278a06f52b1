"""What is asked of whatever does work for a run: cells that are measured, images that are drawn.

An executor takes jobs and gives each back with its outcome, in the order in which they end. It
writes nothing: whoever reads the outcomes does, so that a worker needs no disk in common with it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeVar

__all__ = ["DEATHS", "Executor", "Job", "JobKind"]

#: How often a job may kill its worker before it counts as failed.
DEATHS = 3


class Job(Protocol):
    """A piece of work that a worker, in whatever process, can do by itself."""

    @property
    def id(self) -> str:
        """Its name, which no other job of the run has."""

    @property
    def threads(self) -> int | None:
        """Of torch, while it works; None for torch's own number."""

    @property
    def gpus(self) -> int:
        """Devices that it needs to itself."""

    def perform(self) -> Any:
        """Do it; what goes wrong is an outcome too (:class:`kvpolicy.lab.run.worker.Raised`)."""


JobKind = TypeVar("JobKind", bound=Job)


class Executor(Protocol):
    """What a run asks of an executor."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def workers(self) -> int:
        """Jobs at a time."""

    def run(self, jobs: Sequence[JobKind]) -> Generator[tuple[JobKind, Any], None, None]:
        """Do every job; closing the iterator ends the workers."""
