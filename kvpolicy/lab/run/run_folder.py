"""The folder of an ablation: what was planned, what has finished, what has failed.

::

    plan.json                 the plan as it ran
    subject.json              names of the subject's metrics and classes, and its grid
    environment.json          versions, machine, threads
    log.jsonl                 one line an event, only ever appended to
    cells/<cell-id>/          written whole or not at all
        cell.json             the cell, its figures, what its cache cost
        scores.safetensors    one row an image (or another item)
        images.safetensors    uint8 ``images [n, rows, cols(, 3)]``, where the subject gives some
        trace.safetensors     every decision, where it was asked for
    failures/<cell-id>.json   the traceback of a cell that raised; gone once it succeeds
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import unified_diff
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from kvpolicy.errors import ParameterError
from kvpolicy.lab.run.files import UNFINISHED, whole_folder, write_whole
from kvpolicy.lab.run.plan import Cell, Plan
from kvpolicy.lab.run.records import (
    CellRecord,
    CellStats,
    Damaged,
    Environment,
    Failure,
    LeftOut,
    SubjectInfo,
    read_record,
)
from kvpolicy.lab.run.subject import MetricInfo

__all__ = [
    "CellRecord",
    "CellStats",
    "Damaged",
    "Environment",
    "Failure",
    "FinishedCell",
    "LeftOut",
    "MetricInfo",
    "RunFolder",
    "SubjectInfo",
    "open_run",
]

Arrays = dict[str, NDArray[Any]]


class FinishedCell:
    """A finished cell; arrays are read when asked for.

    Attributes:
        folder: where it lies.
        record: ``cell.json``.

    Raises:
        ParameterError: a file is missing, can't be read, or is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = read_record(CellRecord, folder / "cell.json")
        for name, digest in self.record.files.items():
            file = folder / name
            try:
                found = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError as error:
                raise ParameterError(f"{file} can't be read: {error.strerror}") from None
            if found != digest:
                raise ParameterError(f"{file} is not what was written: it is damaged")

    @property
    def cell(self) -> Cell:
        """The cell that the record is of."""
        return self.record.cell

    def scores(self) -> Arrays:
        """Per-item arrays, by name."""
        return load_file(self.folder / "scores.safetensors")

    def images(self) -> NDArray[np.uint8] | None:
        """What was drawn, uint8 ``[n, rows, cols(, 3)]``; None for a subject that draws nothing."""
        path = self.folder / "images.safetensors"
        return load_file(path)["images"] if path.exists() else None

    @property
    def trace_path(self) -> Path | None:
        """The recorded decisions, where there are some."""
        path = self.folder / "trace.safetensors"
        return path if path.exists() else None


class RunFolder:
    """The folder of one run; see the top of this file for what lies where.

    Make it with :meth:`begin` to write, with :func:`open_run` to read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = read_record(Plan, path / "plan.json")

    @classmethod
    def begin(cls, path: Path, plan: Plan) -> RunFolder:
        """Make the folder, or go on in one that has the same plan.

        Raises:
            ParameterError: it holds another plan (the message shows the difference), or is the
                folder of something else.
        """
        file = path / "plan.json"
        if file.exists():
            held = read_record(Plan, file)
            if held != plan:
                lines = unified_diff(
                    held.text().splitlines(), plan.text().splitlines(), "there", "asked for", n=1
                )
                raise ParameterError(
                    f"{path} holds the results of another plan; take another folder, or the same "
                    f"plan:\n" + "\n".join(line.rstrip() for line in lines)
                )
        elif path.exists() and any(p.name not in _EARLY for p in path.iterdir()):
            raise ParameterError(f"{path} is not empty, and holds no plan; take another folder")
        for folder in (path, path / "cells", path / "failures"):
            folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_whole(file, plan.text())
        for left in (*path.glob(f"*/*{UNFINISHED}"), *path.glob(f"*{UNFINISHED}")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        return cls(path)

    @property
    def environment(self) -> Environment:
        """Versions and machine.

        Raises:
            ParameterError: the run has not begun, or the file is damaged.
        """
        return read_record(Environment, self.path / "environment.json")

    @property
    def subject(self) -> SubjectInfo:
        """The subject's metrics, classes and grid.

        Raises:
            ParameterError: the run has not begun, or the file is damaged.
        """
        return read_record(SubjectInfo, self.path / "subject.json")

    def describe(self, environment: Environment, subject: SubjectInfo) -> None:
        """Write what the run ran on, and what about."""
        write_whole(self.path / "environment.json", environment.text())
        write_whole(self.path / "subject.json", subject.text())

    def get(self, cell: Cell) -> FinishedCell | None:
        """A finished cell; None where it has not finished.

        Raises:
            ParameterError: it is damaged.
        """
        folder = self.path / "cells" / cell.id
        if not folder.exists():
            return None
        found = FinishedCell(folder)
        if found.cell != cell:
            raise ParameterError(f"{folder / 'cell.json'} is another cell's")
        return found

    def finished(self) -> Iterator[FinishedCell]:
        """Every finished cell that is not damaged, in the plan's order."""
        for cell in self.plan.cells():
            with suppress(ParameterError):
                if (found := self.get(cell)) is not None:
                    yield found

    def damaged(self) -> list[Damaged]:
        """Every cell that is there but can't be used, and why, in the plan's order."""
        found = []
        for cell in self.plan.cells():
            try:
                self.get(cell)
            except ParameterError as error:
                found.append(Damaged(cell=cell, reason=str(error)))
        return found

    def failures(self) -> list[Failure]:
        """Every cell that has failed and not finished since, in the plan's order."""
        found = []
        for cell in self.plan.cells():
            file = self.path / "failures" / f"{cell.id}.json"
            if not file.exists():
                continue
            try:
                found.append(read_record(Failure, file))
            except ParameterError as error:
                found.append(Failure(cell=cell, id=cell.id, error=str(error), traceback=""))
        return found

    def keep(
        self,
        record: CellRecord,
        scores: Mapping[str, NDArray[Any]],
        images: NDArray[np.uint8] | None = None,
        trace: bytes | None = None,
    ) -> None:
        """Write a finished cell, whole or not at all; a failure of it is forgotten.

        What stood there of the cell stays until the new one is whole.

        Raises:
            OSError: it could not be written (a full disk); nothing of it is left.
        """
        files = {"scores.safetensors": _pack(scores)}
        if images is not None:
            files["images.safetensors"] = _pack({"images": images})
        if trace is not None:
            files["trace.safetensors"] = trace
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        record = record.model_copy(update={"files": digests})
        with whole_folder(self.path / "cells" / record.id) as fresh:
            # Written by us and not by safetensors, whose error on a full disk is no OSError.
            for name, content in files.items():
                (fresh / name).write_bytes(content)
            (fresh / "cell.json").write_text(record.text(), encoding="utf-8")
        self.note("finished", cell=record.id, seconds=round(record.seconds, 3))
        (self.path / "failures" / f"{record.id}.json").unlink(missing_ok=True)

    def fail(self, cell: Cell, error: str, traceback: str) -> Failure:
        """Write why a cell has no result."""
        file = self.path / "failures" / f"{cell.id}.json"
        before = 0
        with suppress(ParameterError):  # a damaged file costs its count, not the new failure
            before = read_record(Failure, file).attempts if file.exists() else 0
        failure = Failure(
            cell=cell, id=cell.id, error=error, traceback=traceback, attempts=before + 1
        )
        write_whole(file, failure.text())
        self.note("failed", cell=cell.id, error=error)
        return failure

    def note(self, event: str, **about: Any) -> None:
        """Append a line to ``log.jsonl``; a line that a crash cut off ends before the new one."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **about}) + "\n"
        with (self.path / "log.jsonl").open("ab+") as log:
            if log.tell():
                log.seek(-1, 2)
                if log.read(1) != b"\n":
                    line = "\n" + line
            log.write(line.encode())

    def log(self) -> list[dict[str, Any]]:
        """Every event so far, without lines that a crash cut off."""
        path = self.path / "log.jsonl"
        events = []
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return events


#: What may lie in a folder in which a run has not got as far as its plan.
_EARLY = {".lock", "cells", "failures", "plan.json" + UNFINISHED}


def open_run(path: Path | str) -> RunFolder:
    """Open the folder of a run to read it, finished or not.

    Raises:
        ParameterError: there is no run, or its plan is damaged.
    """
    path = Path(path)
    if not (path / "plan.json").exists():
        raise ParameterError(f"{path} is not the folder of a run: it has no plan.json")
    return RunFolder(path)


def _pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
