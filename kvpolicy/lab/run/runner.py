"""Run a plan: what can be is measured, what has finished is kept, what raised is written down."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.errors import BudgetError, ParameterError, RunFolderError, near_matches
from kvpolicy.lab.run.environment import find_environment
from kvpolicy.lab.run.executor import Executor
from kvpolicy.lab.run.executors import Inline
from kvpolicy.lab.run.plan import Cell, Plan
from kvpolicy.lab.run.run_folder import CellRecord, Failure, LeftOut, RunFolder, SubjectInfo
from kvpolicy.lab.run.subject import MetricInfo, Subject
from kvpolicy.lab.run.worker import STANDARD, Measured, Task, subject_of
from kvpolicy.layout import RasterLayout
from kvpolicy.named import make_policy

__all__ = ["Prepared", "Watcher", "alone", "prepare", "run", "writing"]


class Watcher(Protocol):
    """Who wants to know how a run goes."""

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None:
        """The cells that are to be measured, and what an earlier run has finished."""

    def done(self, record: CellRecord) -> None:
        """A cell has been measured, and lies safe in its folder."""

    def failed(self, failure: Failure) -> None:
        """A cell has raised."""


@dataclass(frozen=True)
class Prepared:
    """A plan that has been checked against its subject.

    Attributes:
        plan: the plan.
        subject: what it is about, loaded.
        cells: what can be measured, the baseline first.
        left_out: combinations that can't be.
    """

    plan: Plan
    subject: Subject
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def metrics(self) -> tuple[MetricInfo, ...]:
        """What is measured."""
        metrics = (*self.subject.metrics, *STANDARD)
        wanted = self.plan.metrics
        return tuple(m for m in metrics if wanted is None or m.name in wanted)

    def describe(self) -> SubjectInfo:
        """What a reader needs to know about the subject."""
        subject, layout = self.subject, self.subject.layout
        grid = layout if isinstance(layout, RasterLayout) else None
        return SubjectInfo(
            name=subject.name,
            metrics=tuple(
                MetricInfo(**{name: getattr(metric, name) for name in MetricInfo.model_fields})
                for metric in self.metrics
            ),
            class_names=tuple(getattr(subject, "class_names", ())),
            rows=grid.rows if grid else None,
            cols=grid.cols if grid else None,
            prefix=grid.prefix if grid else 0,
            line_break=grid.line_break if grid else 0,
            num_layers=subject.num_layers,
            left_out=self.left_out,
        )


def prepare(plan: Plan) -> Prepared:
    """Load the subject and check every cell, before anything is measured.

    A combination whose budget is too small for its policy is left out, as long as the policy has
    another one that works.

    Raises:
        UnknownNameError: a policy or the subject is unknown; near matches are listed.
        ParameterError: a parameter, an option or a metric is wrong.
        BudgetError: no budget of the plan is large enough for one of its policies.
    """
    every = plan.cells()
    for cell in every:  # names and parameters first: they are checked in no time
        make_policy(cell.policy, cell.parameters)
    subject = subject_of(every[0])
    known = [metric.name for metric in (*subject.metrics, *STANDARD)]
    for name in plan.metrics or ():
        if name not in known:
            raise ParameterError(
                f"subject {plan.subject!r} has no metric {name!r}; {near_matches(name, known)}"
            )
    cells: list[Cell] = []
    left_out: dict[tuple[str, str | None], BudgetError] = {}
    for cell in every:
        if cell.entry in left_out:
            continue
        try:
            PolicyCache(
                make_policy(cell.policy, cell.parameters),
                cell.budget,
                layout=subject.layout,
                num_layers=subject.num_layers,
            )
        except BudgetError as error:
            left_out[cell.entry] = error
        else:
            cells.append(cell)
    works = {cell.policy for cell in cells}
    for cell in every:
        if cell.policy not in works:
            raise left_out[cell.entry]
    reasons = tuple(
        LeftOut(label=label, budget=budget or "", reason=str(error))
        for (label, budget), error in left_out.items()
    )
    return Prepared(plan, subject, tuple(cells), reasons)


class _Nobody:
    """Wants to know nothing."""

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None: ...
    def done(self, record: CellRecord) -> None: ...
    def failed(self, failure: Failure) -> None: ...


def run(
    prepared: Prepared,
    path: Path | str,
    executor: Executor | None = None,
    threads: int = 1,
    watcher: Watcher | None = None,
) -> RunFolder:
    """Measure every cell that has not finished, and keep each as it ends.

    Cells that failed before are tried again. Interrupt it at any moment, in any way: what has
    finished stays, and the same call goes on from there.

    Args:
        prepared: what to measure.
        path: folder of the run.
        executor: where cells run; in this process by default.
        threads: of torch, in each worker.
        watcher: who is told how it goes.

    Raises:
        ParameterError: the folder holds another plan, or something else.
        RunFolderError: it can't be written, or another run is at work in it.
    """
    path = Path(path)
    executor = executor or Inline()
    watcher = watcher or _Nobody()
    with alone(path):
        environment = find_environment(prepared.subject, executor, threads)
        with writing(path):
            folder = RunFolder.begin(path, prepared.plan)
            folder.describe(environment, prepared.describe())
            finished = [cell.record for cell in folder.finished()]
            have = {record.id for record in finished}
            waiting = [cell for cell in prepared.cells if cell.id not in have]
            about = environment.model_dump(mode="json")
            folder.note("started", pid=os.getpid(), waiting=len(waiting), **about)
        watcher.begun(waiting, finished)
        tasks = [Task(cell, threads, prepared.plan.trace) for cell in waiting]
        # Closing the executor ends its workers, also when the disk is full or Ctrl-C was pressed.
        with closing(executor.run(tasks)) as outcomes:
            for task, outcome in outcomes:
                with writing(path):
                    if isinstance(outcome, Measured):
                        folder.keep(outcome.record, outcome.scores, outcome.images, outcome.trace)
                        watcher.done(outcome.record)
                    else:
                        failure = folder.fail(task.cell, outcome.error, outcome.traceback)
                        watcher.failed(failure)
        return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do where the disk does not take more."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(
            f"{path} can't be written: {error.strerror or error}. Every finished cell is safe; "
            f"make room, and run the same command again to go on"
        ) from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the system lets go of the lock when a process dies."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock", blocking=False)
    try:
        with lock:
            yield
    except Timeout:
        raise RunFolderError(f"another run is at work in {path}; wait for its end") from None
