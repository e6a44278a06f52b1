"""What the blocks say: times, what the cache costs, ratios and their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpolicy.lab.bench.contender import Contender, Dimensions, Workload
from kvpolicy.lab.bench.machine import Machine
from kvpolicy.lab.bench.rounds import Block, Plan

__all__ = ["Figures", "Ratio", "Summary", "summarise"]

Series = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two contenders in the same run.

    Attributes:
        value: from each line's median over the rounds.
        low: smallest among the value and the rounds.
        high: largest among the value and the rounds.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """One contender.

    Attributes:
        name: who.
        kind: of contender.
        step: median seconds of a step.
        mean_step: mean seconds of a step, of the whole image.
        image: seconds of an image batch; each line by its median over the rounds, and lines that
            were not measured by interpolation.
        cache: seconds a step that the cache costs: above the same model without attention.
        overhead: over the floor, in the lines after the budget has filled; None where there is no
            floor, or no such line.
        flat: the last tenth of the lines against as many right after the budget has filled.
        flat_to_floor: the same, of times divided by the floor's in the same line.
        tokens_read: cached tokens that attention read a step, mean.
        bytes_read: weights, keys and values a step, mean.
        roofline: seconds that the machine needs for a step at least.
        cache_bytes: keys and values allocated at the end of an image.
        memory: growth of the process during an image at its peak, in bytes; None if not measured.
    """

    name: str
    kind: str
    step: float
    mean_step: float
    image: float
    cache: float | None
    overhead: Ratio | None
    flat: float | None
    flat_to_floor: float | None
    tokens_read: float
    bytes_read: float
    roofline: float
    cache_bytes: int
    memory: int | None = None


@dataclass(frozen=True)
class Summary:
    """Everything.

    Attributes:
        figures: of each contender.
        faster: how many times as fast a policy is as another contender, by (policy, other).
        cheaper: how many times less its cache costs, likewise.
        by_line: seconds a step in each line that was measured, by contender: lines and seconds.
    """

    figures: list[Figures]
    faster: dict[tuple[str, str], Ratio]
    cheaper: dict[tuple[str, str], Ratio]
    by_line: dict[str, tuple[list[int], list[float]]]

    def as_dict(self) -> dict[str, Any]:
        """Figures and ratios as ``results.json`` holds them, the pairs spelled out."""
        return {
            "figures": [asdict(figures) for figures in self.figures],
            "faster": [{"policy": a, "than": b, **asdict(r)} for (a, b), r in self.faster.items()],
            "cheaper": [
                {"policy": a, "than": b, **asdict(r)} for (a, b), r in self.cheaper.items()
            ],
        }


class _Lines:
    """Mean seconds a step of each line, by round, of one contender."""

    def __init__(self, blocks: Sequence[Block], lines: int) -> None:
        rounds = max(block.round for block in blocks) + 1
        self.times = np.full((rounds, lines), np.nan)
        for block in blocks:
            self.times[block.round, block.line] = np.mean(block.seconds)

    @property
    def median(self) -> Series:
        """Over the rounds; lines that were never measured by interpolation."""
        seen = ~np.isnan(self.times).all(0)
        lines = np.flatnonzero(seen)
        medians = np.nanmedian(self.times[:, seen], axis=0)
        every: Series = np.interp(np.arange(self.times.shape[1]), lines, medians)
        return every

    def whole(self, number: int) -> Series | None:
        """One round's lines; None where its first or last line is missing."""
        times = self.times[number]
        seen = ~np.isnan(times)
        if not (seen[0] and seen[-1]):
            return None
        every: Series = np.interp(np.arange(len(times)), np.flatnonzero(seen), times[seen])
        return every


def summarise(
    blocks: Sequence[Block],
    contenders: Sequence[Contender],
    *,
    plan: Plan,
    workload: Workload,
    dimensions: Dimensions,
    prefix: int,
    machine: Machine,
    cache_bytes: dict[str, int],
    memory: dict[str, int],
) -> Summary:
    """Work everything out from what was measured: lines that all contenders have finished."""
    names = [contender.name for contender in contenders]
    own = {name: [block for block in blocks if block.contender == name] for name in names}
    lines = {name: _Lines(own[name], plan.lines) for name in names}
    baselines = {(each.kind, each.peer, each.variant): lines[each.name] for each in contenders}

    def without(contender: Contender) -> _Lines | None:
        """The same model without attention; another's, or one that runs otherwise, would lie."""
        return baselines.get(("skip", contender.peer, contender.variant))

    # The first line that begins with a full budget.
    steady = -(-(workload.capacity - prefix) // plan.line_length)
    width = workload.torch_dtype.itemsize
    figures = []
    for contender in contenders:
        name = contender.name
        skip = without(contender)
        floor = baselines.get(("floor", "", contender.variant))
        mine = lines[name].median
        read = float(np.mean([r for block in own[name] for r in block.read]))
        weights = dimensions.step_weights * width
        moved = weights + workload.batch * dimensions.cache_bytes(read, width)
        figures.append(
            Figures(
                name=name,
                kind=contender.kind,
                step=float(np.median([s for block in own[name] for s in block.seconds])),
                mean_step=float(mine.mean()),
                image=float(mine.sum()) * plan.line_length,
                cache=None if skip is None else float(mine.mean() - skip.median.mean()),
                overhead=None
                if floor is None
                else _ratio(lines[name], floor, slice(steady, None), 1.0),
                flat=_flat(mine, steady),
                flat_to_floor=None if floor is None else _flat(mine / floor.median, steady),
                tokens_read=read,
                bytes_read=moved,
                roofline=machine.roofline(moved, dimensions.step_flops(workload.batch, read)),
                cache_bytes=cache_bytes.get(name, 0),
                memory=memory.get(name),
            )
        )
    faster: dict[tuple[str, str], Ratio] = {}
    cheaper: dict[tuple[str, str], Ratio] = {}
    others = [c for c in contenders if c.kind not in ("policy", "floor", "skip")]
    others += [c for c in contenders if c.policy == "full"]
    for policy in contenders:
        for other in others:
            if policy.kind != "policy" or policy.name == other.name or policy.policy == "full":
                continue
            pair = (policy.name, other.name)
            ratio = _ratio(lines[other.name], lines[policy.name], slice(None), 0.0)
            if ratio is not None:
                faster[pair] = ratio
            cost = _cheaper(
                lines[other.name],
                lines[policy.name],
                without(other),
                without(policy),
            )
            if cost is not None:
                cheaper[pair] = cost
    by_line = {}
    for name in names:
        seen = np.flatnonzero(~np.isnan(lines[name].times).all(0))
        medians = np.nanmedian(lines[name].times[:, seen], axis=0)
        by_line[name] = (seen.tolist(), medians.tolist())
    return Summary(figures, faster, cheaper, by_line)


def _pairs(above: _Lines, below: _Lines) -> list[tuple[Series, Series]]:
    """Both contenders' lines in each whole round."""
    both = ((above.whole(n), below.whole(n)) for n in range(len(above.times)))
    return [(a, b) for a, b in both if a is not None and b is not None]


def _ratio(above: _Lines, below: _Lines, part: slice, less: float) -> Ratio | None:
    """The ratio of sums over some lines, less a number; None where there are no lines."""
    if not len(above.median[part]):
        return None
    value = float(above.median[part].sum() / below.median[part].sum()) - less
    rounds = [float(a[part].sum() / b[part].sum()) - less for a, b in _pairs(above, below)]
    return Ratio(value, min(value, *rounds), max(value, *rounds))


def _cheaper(
    above: _Lines, below: _Lines, above_skip: _Lines | None, below_skip: _Lines | None
) -> Ratio | None:
    """The ratio of what caches cost; None where one costs too little to be told from nothing."""
    if above_skip is None or below_skip is None:
        return None
    rounds = []
    for number in range(len(below.times)):
        a, b = above.whole(number), below.whole(number)
        without_a, without_b = above_skip.whole(number), below_skip.whole(number)
        if a is None or b is None or without_a is None or without_b is None:
            continue
        if b.sum() > without_b.sum():
            rounds.append(float((a.sum() - without_a.sum()) / (b.sum() - without_b.sum())))
    cost = float(below.median.sum() - below_skip.median.sum())
    if cost <= 0:
        return None
    value = float(above.median.sum() - above_skip.median.sum()) / cost
    return Ratio(value, min(value, *rounds), max(value, *rounds))


def _flat(times: Series, steady: int) -> float | None:
    """The last tenth of the lines against as many right after the budget has filled."""
    tenth = max(1, round(len(times) / 10))
    if steady + 2 * tenth > len(times):
        return None
    return float(times[-tenth:].mean() / times[steady : steady + tenth].mean()) - 1
