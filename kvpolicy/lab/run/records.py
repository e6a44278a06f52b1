"""What the files of a run's folder say, but for its plan and its arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvpolicy.errors import ParameterError
from kvpolicy.lab.run.plan import Cell
from kvpolicy.lab.run.subject import MetricInfo

__all__ = [
    "CellRecord",
    "CellStats",
    "Damaged",
    "Environment",
    "Failure",
    "LeftOut",
    "Provenance",
    "SubjectInfo",
    "read_record",
]

Model = TypeVar("Model", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def text(self) -> str:
        """The file's content: JSON with one field a line, the same for equal records."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


class LeftOut(_Record):
    """A combination that can't be, and why: a policy that needs a larger budget, say."""

    label: str
    budget: str
    reason: str


class SubjectInfo(_Record):
    """What a reader of a run needs to know about its subject.

    Attributes:
        name: the subject's own name.
        metrics: what was measured; the first one is the main one.
        class_names: of the items, where they have classes.
        rows: of the image grid; None for text.
        cols: of the image grid; None for text.
        prefix: pinned tokens before the first one of the grid.
        line_break: tokens that end a line.
        num_layers: layers that have a cache.
        left_out: combinations of the plan that can't be.
    """

    name: str
    metrics: tuple[MetricInfo, ...]
    class_names: tuple[str, ...] = ()
    rows: int | None = None
    cols: int | None = None
    prefix: int = 0
    line_break: int = 0
    num_layers: int
    left_out: tuple[LeftOut, ...] = ()


class Environment(_Record):
    """What the run ran on.

    Attributes:
        versions: of Python, kvpolicy, torch, transformers, numpy.
        revision: of the git repository that kvpolicy runs from, if any; ends in ``+`` where files
            were changed.
        system: operating system and machine type.
        processor: number of logical processors.
        device: where tensors lay.
        threads: of torch, in each worker.
        executor: what ran the cells.
    """

    versions: dict[str, str]
    revision: str | None = None
    system: str
    processors: int
    device: str
    threads: int
    executor: str


class Provenance(_Record):
    """What a cell's figures depend on, besides the cell itself.

    Attributes:
        versions: of Python, kvpolicy, torch, transformers, numpy, and of the CPU kernel.
        code: digests of the sources of kvpolicy, of the policy, of the decoder and of the subject.
        threads: of torch.
    """

    versions: dict[str, str]
    code: dict[str, str]
    threads: int


class CellStats(_Record):
    """What the cache cost; see :class:`kvpolicy.CacheStats`.

    Attributes:
        budgets: evictable tokens a head may hold, per layer.
        peak_tokens: most tokens that a head held at any instant, prefix included, per layer.
        bytes: keys and values allocated for one sequence.
        overhead_bytes: positions and observers beside them, for one sequence.
        evictions: tokens that a head lost, per layer.
    """

    budgets: tuple[int, ...]
    peak_tokens: tuple[int, ...]
    bytes: int
    overhead_bytes: int
    evictions: tuple[int, ...]


class CellRecord(_Record):
    """``cell.json``: a finished cell.

    Attributes:
        cell: what was measured.
        id: name of its folder.
        parameters: all parameters of the policy, defaults included.
        metrics: name to figure.
        stats: what its cache cost.
        seconds: that it took.
        made_by: versions, code and threads that it was measured with; None for a cell that was
            written before this was kept.
        files: SHA-256 of the files beside it, by name.
    """

    cell: Cell
    id: str
    parameters: dict[str, Any]
    metrics: dict[str, float]
    stats: CellStats
    seconds: float
    made_by: Provenance | None = None
    files: dict[str, str] = {}


class Damaged(_Record):
    """A cell whose files can't be read, or are not those that were written.

    Attributes:
        cell: what was measured.
        reason: which file, and what is wrong with it.
    """

    cell: Cell
    reason: str


class Failure(_Record):
    """``failures/<cell-id>.json``: a cell that raised, or whose worker died.

    Attributes:
        cell: what was to be measured.
        id: its name.
        error: the exception, in one line.
        traceback: all of it.
        attempts: how often this cell has failed.
    """

    cell: Cell
    id: str
    error: str
    traceback: str
    attempts: int = 1


def read_record(kind: type[Model], path: Path) -> Model:
    """Read a model from its JSON file.

    Raises:
        ParameterError: the file can't be read, or says something else.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ParameterError(f"{path} can't be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ParameterError(f"{path} can't be read: {where}{first['msg']}") from None
