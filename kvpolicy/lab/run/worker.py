"""Measure one cell, in whatever process an executor chose: tasks in, outcomes out."""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpolicy.decoding import Decoder
from kvpolicy.errors import ShapeError
from kvpolicy.lab.run.plan import Cell
from kvpolicy.lab.run.provenance import provenance
from kvpolicy.lab.run.run_folder import CellRecord, CellStats
from kvpolicy.lab.run.subject import Measurement, MetricInfo, Setting, Subject, load_subject
from kvpolicy.named import make_policy

__all__ = [
    "STANDARD",
    "Measured",
    "Outcome",
    "Raised",
    "Task",
    "measure_cell",
    "subject_of",
    "threads_of_torch",
]

#: What every subject is measured by, whatever its own metrics are.
STANDARD = (
    MetricInfo(
        name="peak_tokens",
        label="peak cached tokens a head",
        better=None,
        about="prefix included, mean over layers",
    ),
    MetricInfo(
        name="cache_bytes",
        label="cache bytes",
        better=None,
        about="keys and values allocated for one sequence",
    ),
)


@dataclass(frozen=True)
class Task:
    """What a worker is asked.

    Attributes:
        cell: what to measure.
        threads: of torch, while it measures.
        trace: whether every decision shall be recorded.
    """

    cell: Cell
    threads: int = 1
    trace: bool = False

    @property
    def id(self) -> str:
        """The cell's."""
        return self.cell.id

    @property
    def gpus(self) -> int:
        """None: a subject says itself where it computes."""
        return 0

    def perform(self) -> Outcome:
        """Measure the cell."""
        return measure_cell(self)


@dataclass(frozen=True)
class Measured:
    """A cell that went well: what goes into its folder."""

    record: CellRecord
    scores: dict[str, NDArray[Any]]
    images: NDArray[np.uint8] | None = None
    trace: bytes | None = None


@dataclass(frozen=True)
class Raised:
    """A cell that raised, or whose worker died."""

    error: str
    traceback: str = field(repr=False)


Outcome = Measured | Raised


def measure_cell(task: Task) -> Outcome:
    """Measure a cell; an exception of the subject or the policy is an outcome too."""
    try:
        # What a subject prints is for people; standard output may be lines for programs.
        with redirect_stdout(sys.stderr):
            return _measure(task)
    except Exception as error:
        about = " ".join(f"{type(error).__name__}: {error}".split())
        return Raised(about[:500], traceback.format_exc())


def subject_of(cell: Cell) -> Subject:
    """The subject of a cell, made once a process."""
    return _made(cell.subject, json.dumps(cell.options, sort_keys=True))


@lru_cache(maxsize=2)
def _made(name: str, options: str) -> Subject:
    with redirect_stdout(sys.stderr):
        return load_subject(name, json.loads(options))


def _measure(task: Task) -> Measured:
    cell = task.cell
    begun = time.perf_counter()
    with threads_of_torch(task.threads):
        subject = subject_of(cell)
        metrics = (*subject.metrics, *STANDARD)
        wanted = [m.name for m in metrics if cell.metrics is None or m.name in cell.metrics]
        policy = make_policy(cell.policy, cell.parameters)
        setting = Setting(policy, cell.budget, Decoder.parse(cell.decoder))
        made_by = provenance(setting, subject, task.threads)
        # A subject that forgets to seed is repeatable all the same.
        random.seed(cell.seed)
        np.random.seed(cell.seed % 2**32)  # noqa: NPY002
        torch.manual_seed(cell.seed)
        measured = subject.measure(setting, cell.seed, wanted)
        scores = {name: _numbers(name, array) for name, array in measured.arrays.items()}
        figures = _figures(subject, measured, scores, wanted)
        trace = measured.trace
        if task.trace and trace is None and hasattr(subject, "trace"):
            trace = subject.trace(setting, cell.seed)
    stats = _stats(measured)
    standard = {
        "peak_tokens": sum(stats.peak_tokens) / len(stats.peak_tokens),
        "cache_bytes": float(stats.bytes),
    }
    figures |= {name: value for name, value in standard.items() if name in wanted}
    record = CellRecord(
        cell=cell,
        id=cell.id,
        parameters=policy.model_dump(mode="json"),
        metrics=figures,
        stats=stats,
        seconds=time.perf_counter() - begun,
        made_by=made_by,
    )
    if trace is not None and not isinstance(trace, bytes):
        raise ShapeError(f"the subject's trace must be bytes, not {type(trace).__name__}")
    return Measured(record, scores, measured.images, trace)


def _numbers(name: str, array: Any) -> NDArray[Any]:
    """A per-item array that a file can hold.

    Raises:
        ShapeError: it holds something else than numbers.
    """
    found = np.asarray(array)
    if found.dtype.kind not in "biuf" or found.dtype.itemsize > 8:
        raise ShapeError(
            f"array {name!r} holds {found.dtype}; a subject's arrays hold numbers or booleans (the "
            f"number of a class, say, not its name)"
        )
    return found


def _figures(
    subject: Subject, measured: Measurement, scores: dict[str, NDArray[Any]], wanted: list[str]
) -> dict[str, float]:
    """The subject's own metrics.

    Raises:
        ShapeError: an array or a figure that a metric needs is not there, or not finite.
    """
    found = {}
    for metric in subject.metrics:
        if metric.name not in wanted:
            continue
        if metric.array is None:
            if metric.name not in measured.figures:
                raise ShapeError(f"metric {metric.name!r}: the subject's figures lack it")
            value = float(measured.figures[metric.name])
        else:
            array = scores.get(metric.array)
            if array is None or not array.ndim or not len(array):
                raise ShapeError(
                    f"metric {metric.name!r}: the subject gave no array {metric.array!r} with rows"
                )
            if metric.items is not None and len(scores.get(metric.items, ())) != len(array):
                raise ShapeError(
                    f"metric {metric.name!r}: array {metric.items!r} must have a row for each of "
                    f"the {len(array)} rows of {metric.array!r}"
                )
            if not np.isfinite(array).all():
                raise ShapeError(f"metric {metric.name!r}: {metric.array!r} is not finite")
            value = float(array.mean() if metric.statistic is None else metric.statistic(array))
        if not np.isfinite(value):
            raise ShapeError(f"metric {metric.name!r} is {value}")
        found[metric.name] = value
    if measured.images is not None:
        images = np.asarray(measured.images)
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or images.shape[3:] not in ((), (3,))
        ):
            raise ShapeError(
                f"images must be uint8 [n, rows, cols], or [n, rows, cols, 3] in colour, not "
                f"{images.dtype} {list(images.shape)}"
            )
    return found


def _stats(measured: Measurement) -> CellStats:
    stats = measured.stats
    return CellStats(
        budgets=stats.budgets,
        peak_tokens=stats.peak_tokens,
        bytes=stats.bytes // measured.batch,
        overhead_bytes=stats.overhead_bytes // measured.batch,
        evictions=stats.evictions,
    )


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Give torch so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
