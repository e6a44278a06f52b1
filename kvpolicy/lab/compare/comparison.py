"""What the cells of a run say together: estimates with intervals, and paired differences to full.

The seeds of a policy at a budget are pooled. Intervals are bootstrap intervals over items (images,
pieces of text); the same resamples serve every policy, so that the difference to the full cache is
taken on the same items each time. A figure without items (images per second) is resampled over
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpolicy.lab.compare.bootstrap import interval, replicates
from kvpolicy.lab.run.run_folder import FinishedCell
from kvpolicy.lab.run.subject import Metric, MetricInfo

__all__ = ["Entry", "Estimate", "Finding", "compare"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval; the ends are None where too little was measured for one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Finding:
    """One metric of one entry.

    Attributes:
        estimate: the figure.
        difference: to the full cache on the same items; None for the full cache itself, and
            where nothing can be paired.
        p: chance of such a difference, or a larger one, where there is none (two-sided, from the
            bootstrap's standard error); None where there is no difference to judge.
        clear: whether the difference is not noise: p, corrected for the number of comparisons of
            this metric (Holm), is below 0.05.
        items: how many items the figure comes from; None for a figure without items.
    """

    estimate: Estimate
    difference: Estimate | None = None
    p: float | None = None
    clear: bool = False
    items: int | None = None


@dataclass(frozen=True)
class Entry:
    """A policy with its parameters at one budget: all of its seeds.

    Attributes:
        label: policy with the parameters that were set.
        budget: None for the full cache.
        cells: one a seed.
        findings: by the name of the metric.
    """

    label: str
    budget: str | None
    cells: tuple[FinishedCell, ...] = field(repr=False)
    findings: dict[str, Finding]

    @property
    def policy(self) -> str:
        """The policy as the plan names it, without the parameters that ``label`` shows."""
        return self.cells[0].cell.policy

    @property
    def is_full(self) -> bool:
        """Whether this is what the others are compared with."""
        return self.cells[0].cell.is_baseline


@dataclass(frozen=True)
class _Sample:
    """An entry's items for one metric, and the statistic on each resample of them."""

    items: NDArray[Any]
    value: float
    replicates: Array


def compare(cells: Sequence[FinishedCell], metrics: Sequence[MetricInfo]) -> list[Entry]:
    """Pool seeds, find intervals, and compare each entry with the full cache.

    Args:
        cells: finished cells, the full cache's among them if anything is to be compared.
        metrics: what to look at. A :class:`Metric` brings its own statistic. A plain
            :class:`MetricInfo` stands for a mean; where the cells' figures are none, they have no
            interval, for only their subject could compute one.

    Returns:
        Entries in the order in which they first appear among the cells.
    """
    groups: dict[tuple[str, str | None], list[FinishedCell]] = {}
    for cell in cells:
        groups.setdefault(cell.cell.entry, []).append(cell)
    groups = {
        entry: sorted(group, key=lambda cell: cell.cell.seed) for entry, group in groups.items()
    }
    full = next((group for group in groups.values() if group[0].cell.is_baseline), None)
    sampler = _Sampler(cells)
    found: dict[str, list[Finding | None]] = {
        metric.name: _judged([_finding(group, full, metric, sampler) for group in groups.values()])
        for metric in metrics
    }
    return [
        Entry(
            label,
            budget,
            tuple(group),
            {
                name: finding
                for name, findings in found.items()
                if (finding := findings[number]) is not None
            },
        )
        for number, ((label, budget), group) in enumerate(groups.items())
    ]


class _Sampler:
    """Samples of groups of cells, each made once."""

    def __init__(self, cells: Sequence[FinishedCell]) -> None:
        self._scores = {cell.record.id: cell.scores() for cell in cells}
        self._made: dict[tuple[str, ...], _Sample | None] = {}

    def sample(self, group: Sequence[FinishedCell], metric: MetricInfo) -> _Sample | None:
        """The items of these cells; None where none of them has the metric."""
        key = (metric.name, *(cell.record.id for cell in group))
        if key not in self._made:
            self._made[key] = self._make(group, metric)
        return self._made[key]

    def _make(self, group: Sequence[FinishedCell], metric: MetricInfo) -> _Sample | None:
        cells = [cell for cell in group if metric.name in cell.record.metrics]
        if not cells:
            return None
        seeds = np.array([cell.cell.seed for cell in cells])
        figures = np.array([cell.record.metrics[metric.name] for cell in cells])
        if metric.array is None:
            return _Sample(seeds, float(figures.mean()), replicates(figures, None))
        arrays = [self._scores[cell.record.id][metric.array] for cell in cells]
        if not isinstance(metric, Metric) and not np.allclose(
            [array.mean() for array in arrays], figures, rtol=1e-9, atol=0
        ):
            return _Sample(seeds, float(figures.mean()), np.empty(0))
        values = np.concatenate(arrays).astype(np.float64)
        statistic = metric.statistic if isinstance(metric, Metric) else None
        if metric.items is None:
            items = np.concatenate(
                [
                    np.stack([np.full(len(array), seed), np.arange(len(array))], axis=1)
                    for seed, array in zip(seeds, arrays, strict=True)
                ]
            )
        else:
            ids = np.concatenate([self._scores[cell.record.id][metric.items] for cell in cells])
            items, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
            # An item that several seeds have measured counts once, with its mean.
            total = np.zeros((len(items), *values.shape[1:]))
            np.add.at(total, inverse.ravel(), values)
            values = total / counts.reshape(-1, *(1,) * (values.ndim - 1))
        value = float(values.mean()) if statistic is None else statistic(values)
        return _Sample(items, value, replicates(values, statistic))


def _finding(
    group: list[FinishedCell],
    full: list[FinishedCell] | None,
    metric: MetricInfo,
    sampler: _Sampler,
) -> Finding | None:
    own = sampler.sample(group, metric)
    if own is None:
        return None
    found = Finding(
        _estimate(own.value, own.replicates),
        items=None if metric.array is None or not len(own.replicates) else len(own.items),
    )
    if full is None or group is full or metric.better is None:
        return found
    # Only seeds that both have can be compared.
    both = {cell.cell.seed for cell in group} & {cell.cell.seed for cell in full}
    own, other = (
        sampler.sample([cell for cell in side if cell.cell.seed in both], metric)
        for side in (group, full)
    )
    if own is None or other is None or not np.array_equal(own.items, other.items):
        return found
    drawn = own.replicates - other.replicates
    value = own.value - other.value
    difference = _estimate(value, drawn)
    if metric.timing or len(drawn) < 2:
        return replace(found, difference=difference)
    error = float(drawn.std(ddof=1))
    p = math.erfc(abs(value) / error / math.sqrt(2)) if error else float(value == 0)
    return replace(found, difference=difference, p=p)


def _estimate(value: float, drawn: Array) -> Estimate:
    """A figure with its interval, where there are replicates to take one from."""
    return Estimate(value) if len(drawn) < 2 else Estimate(value, *interval(value, drawn))


def _judged(findings: list[Finding | None]) -> list[Finding | None]:
    """Say which differences are clear: Holm's step-down over all comparisons of a metric."""
    judged = list(findings)
    order = sorted(
        (f.p, number) for number, f in enumerate(findings) if f is not None and f.p is not None
    )
    for rank, (p, number) in enumerate(order):
        if p * (len(order) - rank) >= 0.05:
            break
        old = findings[number]
        assert old is not None
        judged[number] = replace(old, clear=True)
    return judged
