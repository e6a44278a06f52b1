"""The one bootstrap: every interval that a table, a plot or a command shows is made here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpolicy.errors import ParameterError, ShapeError

__all__ = ["interval", "paired_bootstrap", "replicates"]

Array = NDArray[np.float64]

_CHUNK = 2**22  # numbers drawn at once: 32 MB
#: Resamples of a mean, and of a statistic that has to be computed anew for each.
_MEANS, _OTHERS = 4000, 1000


def replicates(values: Array, statistic: Callable[[Array], float] | None = None) -> Array:
    """A statistic on resamples of the rows, drawn with replacement.

    Equal numbers of rows give equal resamples, so that the difference of two replicates is the
    difference on the same rows.

    Args:
        values: ``[n, ...]``.
        statistic: of ``[n, ...]``; the mean of everything where it is None.

    Returns:
        4,000 means or 1,000 statistics; none where there are fewer than two rows.
    """
    count = len(values)
    random = np.random.default_rng(0)
    if count < 2:
        return np.empty(0)
    if statistic is not None:
        picks = (random.integers(count, size=count) for _ in range(_OTHERS))
        return np.array([statistic(values[pick]) for pick in picks])
    values = values.reshape(count, -1).mean(1)
    chunk = max(1, _CHUNK // count)
    return np.concatenate(
        [
            values[random.integers(count, size=(min(chunk, _MEANS - at), count))].mean(1)
            for at in range(0, _MEANS, chunk)
        ]
    )


def interval(value: float, drawn: Array, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval, moved so that it is centred on the figure.

    A resample holds some items twice and others not at all, which shifts a statistic such as a
    Fréchet distance upwards, every time. The shift says nothing about the figure's uncertainty, so
    it is taken out; for a mean it is next to nothing.

    Args:
        value: the figure.
        drawn: its replicates, two or more.
        confidence: share of replicates that lie inside.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) - (drawn.mean() - value)
    return float(low), float(high)


def paired_bootstrap(
    differences: ArrayLike, *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of paired differences, and the interval of that mean.

    Args:
        differences: one number a pair (an image under two policies, say), ``[n]``.
        confidence: share of resamples that the interval covers, between 0 and 1.

    Returns:
        ``(mean, low, high)``, in the unit of the differences; equal arguments give equal results.

    Raises:
        ShapeError: ``differences`` is not one-dimensional, or holds fewer than two.
        ParameterError: it holds a number that is not finite, or ``confidence`` is out of range.

    Source:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.

    Example:
        >>> mean, low, high = paired_bootstrap([0.01, 0.02, 0.03])
        >>> low < mean < high
        True
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ShapeError(f"differences must be [n] with n > 1, not {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ParameterError("differences hold a number that is not finite")
    if not 0 < confidence < 1:
        raise ParameterError(f"confidence={confidence} is not between 0 and 1")
    value = float(values.mean())
    return value, *interval(value, replicates(values), confidence)
