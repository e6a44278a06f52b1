"""The order of locality-aware parallel decoding: near to what is there, far from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpolicy.errors import ParameterError

__all__ = ["locality_aware_order"]

_DIAGONAL = 1 / math.sqrt(2)


def locality_aware_order(
    rows: int,
    cols: int,
    groups: Sequence[int],
    *,
    repulsion: int = 1,
    proximity: float = 1.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Which place of a grid comes when, so that groups have context and don't need each other.

    Group by group (arXiv:2507.01957, algorithm 1). A place's proximity is the sum of 1/distance
    to what has come among its eight neighbours. Places whose proximity reaches ``proximity`` are
    taken, the nearest first, unless one of the same group lies within ``repulsion`` rows and
    columns; what is then missing from the group is filled by farthest-point sampling, which takes
    the place that is farthest from those already in the group (any place, where it has none).
    Equal proximities come in random order.

    Args:
        rows: rows of the grid.
        cols: columns of the grid.
        groups: sizes of the groups, which add up to ``rows * cols``.
        repulsion: rows and columns (Chebyshev distance) that places of one group keep apart, as
            long as there are enough near places that do.
        proximity: the smallest proximity at which a place counts as near.
        seed: of the first place and of ties.

    Returns:
        Raster indices ``row * cols + col``, int64 ``[rows * cols]``, in order of arrival.

    Raises:
        ParameterError: a group is empty, or they don't add up to the grid.
    """
    places = rows * cols
    if not groups or min(groups) < 1 or sum(groups) != places:
        raise ParameterError(
            f"locality_aware_order: groups must be sizes of at least 1 that add up to {rows} x "
            f"{cols} = {places}, not {list(groups)!r}, which add up to {sum(groups)}; "
            f"kvpolicy.group_sizes({places}, passes) makes such sizes"
        )
    draw = np.random.default_rng(seed)
    row, col = np.divmod(np.arange(places), cols)
    # Counts of neighbours that have come, by side and by corner: exact, so that ties are ties.
    sides, corners = np.zeros((2, rows + 2, cols + 2), np.int64)
    left = np.ones(places, bool)
    order: list[int] = []
    for size in groups:
        near = (sides + corners * _DIAGONAL)[1:-1, 1:-1].reshape(-1)
        shuffled = draw.permutation(places)
        shuffled = shuffled[left[shuffled]]
        ranked = shuffled[np.argsort(-near[shuffled], kind="stable")]
        reach = int((near[ranked] >= proximity).sum()) if order else 0
        group, rest = _apart(ranked[:reach], row, col, size, repulsion)
        if len(group) < size:
            waiting = np.concatenate([ranked[reach:], rest])
            if not group:  # nothing to be far from
                group.append(int(waiting[draw.integers(len(waiting))]))
                waiting = waiting[waiting != group[0]]
            group += _farthest(group, waiting, row, col, size - len(group))
        for place in group:
            r, c = row[place] + 1, col[place] + 1
            sides[[r - 1, r + 1, r, r], [c, c, c - 1, c + 1]] += 1
            corners[[r - 1, r - 1, r + 1, r + 1], [c - 1, c + 1, c - 1, c + 1]] += 1
        left[group] = False
        order += group
    return np.array(order, np.int64)


def _apart(
    near: NDArray[np.int64],
    row: NDArray[np.int64],
    col: NDArray[np.int64],
    size: int,
    repulsion: int,
) -> tuple[list[int], NDArray[np.int64]]:
    """Up to ``size`` of the near places that keep apart, and the near places that were not taken.

    Those refused come first among the latter, then those that were not looked at.
    """
    group: list[int] = []
    refused: list[int] = []
    blocked = np.zeros((row[-1] + 1 + 2 * repulsion, col[-1] + 1 + 2 * repulsion), bool)
    width = 2 * repulsion + 1
    looked = 0
    for place in near:
        if len(group) == size:
            break
        looked += 1
        r, c = row[place], col[place]
        if blocked[r + repulsion, c + repulsion]:
            refused.append(int(place))
            continue
        blocked[r : r + width, c : c + width] = True
        group.append(int(place))
    return group, np.concatenate([np.array(refused, np.int64), near[looked:]])


def _farthest(
    group: list[int],
    waiting: NDArray[np.int64],
    row: NDArray[np.int64],
    col: NDArray[np.int64],
    count: int,
) -> list[int]:
    """``count`` of the waiting places, one after the other the farthest from all in the group."""
    if len(waiting) <= count:
        return [int(place) for place in waiting]
    away = np.full(len(waiting), np.iinfo(np.int64).max)
    for place in group:
        away = np.minimum(away, _squared(waiting, place, row, col))
    chosen: list[int] = []
    for _ in range(count):
        index = int(away.argmax())
        chosen.append(int(waiting[index]))
        away = np.minimum(away, _squared(waiting, chosen[-1], row, col))
    return chosen


def _squared(
    places: NDArray[np.int64], place: int, row: NDArray[np.int64], col: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Squared Euclidean distances of places to one place, whole numbers."""
    squared: NDArray[np.int64] = (row[places] - row[place]) ** 2 + (col[places] - col[place]) ** 2
    return squared
