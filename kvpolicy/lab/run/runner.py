"""Run a plan: what can be is measured, what has finished is kept, what raised is written down."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from filelock import FileLock, Timeout

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.decoding import Decoder
from kvpolicy.errors import (
    BudgetError,
    KVPolicyError,
    LayoutError,
    ParameterError,
    RunFolderError,
    near_matches,
)
from kvpolicy.lab.run.environment import find_environment
from kvpolicy.lab.run.executor import Executor
from kvpolicy.lab.run.executors import Inline
from kvpolicy.lab.run.plan import SEQUENTIAL, Cell, Plan
from kvpolicy.lab.run.provenance import differences, provenance
from kvpolicy.lab.run.run_folder import (
    CellRecord,
    Damaged,
    Failure,
    FinishedCell,
    LeftOut,
    RunFolder,
    SubjectInfo,
)
from kvpolicy.lab.run.subject import MetricInfo, Setting, Subject, layout_under
from kvpolicy.lab.run.worker import STANDARD, Measured, Task, subject_of
from kvpolicy.layout import LateLayout, RasterLayout, TokenLayout
from kvpolicy.named import make_policy

__all__ = [
    "Prepared",
    "Stale",
    "Watcher",
    "alone",
    "prepare",
    "refuse_stale",
    "run",
    "stale_because",
    "writing",
]


#: What becomes of finished cells that were measured otherwise than they would be now.
Stale: TypeAlias = Literal["refuse", "anew", "keep"]


class Watcher(Protocol):
    """Who wants to know how a run goes."""

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None:
        """The cells that are to be measured, and what an earlier run has finished."""

    def damaged(self, item: Damaged) -> None:
        """A cell that had finished can't be used, and is measured again."""

    def done(self, record: CellRecord) -> None:
        """A cell has been measured, and lies safe in its folder."""

    def failed(self, failure: Failure) -> None:
        """A cell has raised, or its worker died; its traceback is in the folder."""


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
        """The subject's metrics and the standard ones, but for those that the plan leaves out."""
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

    A combination whose budget is too small for its policy, or whose decoder draws in an order that
    the policy does not work in, is left out, as long as the policy has another one that works.

    Raises:
        UnknownNameError: a policy or the subject is unknown; near matches are listed.
        ParameterError: a parameter, an option, a metric or a decoder is wrong.
        BudgetError: no budget of the plan is large enough for one of its policies.
        LayoutError: the subject can't draw with a decoder, or a policy with none of them.
    """
    every = plan.cells()
    for cell in every:  # names and parameters first: they are checked in no time
        make_policy(cell.policy, cell.parameters)
    subject = subject_of(every[0])
    layouts: dict[str, TokenLayout | LateLayout] = {}
    for decoder in dict.fromkeys(cell.decoder for cell in every):
        if decoder != SEQUENTIAL and not getattr(subject, "draws", False):
            raise ParameterError(
                f"subject {plan.subject!r} does not draw with decoders (it has no `draws = True`), "
                f"so decoder {decoder!r} would change nothing; leave it out"
            )
        try:
            layouts[decoder] = layout_under(subject, Decoder.parse(decoder))
        except LayoutError as error:
            raise LayoutError(f"subject {plan.subject!r}: {error}") from None
    known = [metric.name for metric in (*subject.metrics, *STANDARD)]
    for name in plan.metrics or ():
        if name not in known:
            raise ParameterError(
                f"subject {plan.subject!r} has no metric {name!r}; {near_matches(name, known)}"
            )
    cells: list[Cell] = []
    left_out: dict[tuple[str, str | None], KVPolicyError] = {}
    for cell in every:
        if cell.entry in left_out:
            continue
        try:
            PolicyCache(
                make_policy(cell.policy, cell.parameters),
                cell.budget,
                layout=layouts[cell.decoder],
                num_layers=subject.num_layers,
            )
        except (BudgetError, LayoutError) as error:
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
    """The watcher of a run that nobody watches."""

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None: ...
    def damaged(self, item: Damaged) -> None: ...
    def done(self, record: CellRecord) -> None: ...
    def failed(self, failure: Failure) -> None: ...


def run(
    prepared: Prepared,
    path: Path | str,
    executor: Executor | None = None,
    threads: int = 1,
    watcher: Watcher | None = None,
    stale: Stale = "refuse",
) -> RunFolder:
    """Measure every cell that has not finished, and keep each as it ends.

    Cells that failed before are tried again, and damaged ones measured again. Interrupt it at any
    moment, in any way: what has finished stays, and the same call goes on from there.

    Args:
        prepared: what to measure.
        path: folder of the run.
        executor: where cells run; in this process by default.
        threads: of torch, in each worker.
        watcher: who is told how it goes.
        stale: what becomes of finished cells that were measured by other code, with other versions
            or another number of threads: ``"refuse"`` to go on, measure them ``"anew"``, or
            ``"keep"`` them.

    Raises:
        ParameterError: the folder holds another plan, or something else, or stale cells that are
            not to be measured anew or kept.
        RunFolderError: it can't be written, or another run is at work in it.
    """
    path = Path(path)
    executor = executor or Inline()
    watcher = watcher or _Nobody()
    with alone(path):
        environment = find_environment(prepared.subject, executor, threads)
        with writing(path):
            folder = RunFolder.begin(path, prepared.plan)
        damaged = folder.damaged()
        finished = _usable(folder, prepared, threads, stale)
        have = {record.id for record in finished}
        waiting = [cell for cell in prepared.cells if cell.id not in have]
        with writing(path):
            folder.describe(environment, prepared.describe())
            for item in damaged:
                folder.note("damaged", cell=item.cell.id, reason=item.reason)
            about = environment.model_dump(mode="json")
            folder.note("started", pid=os.getpid(), waiting=len(waiting), **about)
        for item in damaged:
            watcher.damaged(item)
        watcher.begun(waiting, finished)
        tasks = [Task(cell, threads, prepared.plan.trace) for cell in waiting]
        # Closing the executor ends its workers, also when the disk is full or Ctrl-C was pressed.
        with closing(executor.run(tasks)) as outcomes:
            for task, outcome in outcomes:
                # The watcher stands outside: where it can't print, nobody's disk is full.
                if isinstance(outcome, Measured):
                    with writing(path):
                        folder.keep(outcome.record, outcome.scores, outcome.images, outcome.trace)
                    watcher.done(outcome.record)
                else:
                    with writing(path):
                        failure = folder.fail(task.cell, outcome.error, outcome.traceback)
                    watcher.failed(failure)
        return folder


def stale_because(found: FinishedCell, subject: Subject, threads: int) -> str | None:
    """Why a finished cell's figures may not be those that it would get now; None where they are."""
    cell = found.cell
    policy = make_policy(cell.policy, cell.parameters)
    setting = Setting(policy, cell.budget, Decoder.parse(cell.decoder))
    now = provenance(setting, subject, threads)
    return "; ".join(differences(found.record.made_by, now)) or None


def refuse_stale(path: Path, stale: Mapping[str, str], count: int) -> ParameterError:
    """What to say of stale cells that nobody has decided about.

    Args:
        path: folder of the run.
        stale: by reason, one of the cells that have it.
        count: of the cells.
    """
    reasons = [f"{reason} (e.g. {label})" for reason, label in stale.items()]
    return ParameterError(
        f"{path} holds {count} finished cells that were measured otherwise than they would be now: "
        f"{'. '.join(reasons)}. Measure them anew with --stale, keep them as they are with "
        f"--keep-stale, or take another folder"
    )


def _usable(folder: RunFolder, prepared: Prepared, threads: int, stale: Stale) -> list[CellRecord]:
    """What has finished and need not be measured again."""
    usable, old = [], {}
    for found in folder.finished():
        reason = stale_because(found, prepared.subject, threads)
        if reason is not None and stale != "keep":
            old[found.record.id] = (reason, f"{found.cell.label}, seed {found.cell.seed}")
        else:
            usable.append(found.record)
    if old and stale == "refuse":
        raise refuse_stale(folder.path, dict(reversed(old.values())), len(old))
    return usable


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do where the disk does not take more, or nothing may be written."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RunFolderError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room, and" if full else "see to that, or copy it to where you may write, and"
        raise RunFolderError(
            f"{path} can't be written: {error.strerror or error}. What was finished is safe; "
            f"{advice} run the same command again to go on"
        ) from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the system lets go of the lock when a process dies."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock", blocking=False)
    with writing(path):
        try:
            lock.acquire()
        except Timeout:
            raise RunFolderError(f"another run is at work in {path}; wait for its end") from None
    try:
        yield
    finally:
        lock.release()
