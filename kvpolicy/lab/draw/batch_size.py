"""How many images at a time: found while drawing, not guessed."""

from __future__ import annotations

import os

__all__ = ["BatchSize"]

#: A larger batch is kept where it draws faster by this much: images of one only wait longer.
_FASTER = 1.05
#: Share of the processor's free memory that a batch's caches may take.
_SHARE = 0.5


class BatchSize:
    """Doubles while that is faster and fits; halves where memory runs out.

    Args:
        fixed: a size that was asked for, which is kept, but for running out of memory; None to
            find one.
        first: where to begin.
    """

    def __init__(self, fixed: int | None = None, first: int = 4) -> None:
        self.size = fixed or first
        self._settled = fixed is not None
        self._best = 0.0

    def went_well(self, count: int, seconds: float, image_bytes: int, on_cpu: bool) -> None:
        """Learn from a batch.

        Args:
            count: images in it.
            seconds: that it took.
            image_bytes: of the caches of one image.
            on_cpu: whether memory is the processor's, whose end no exception tells.
        """
        if self._settled or count < self.size:
            return
        rate = count / seconds
        if rate < self._best * _FASTER:
            self.size //= 2  # as fast as this one, or faster
            self._settled = True
            return
        self._best = rate
        if on_cpu and 2 * self.size * image_bytes > _SHARE * _free():
            self._settled = True
            return
        self.size *= 2

    def ran_out(self, count: int) -> bool:
        """Whether a smaller batch is left to try, after one of ``count`` had no room."""
        if count == 1:
            return False
        self.size = count // 2
        self._settled = True
        return True


def _free() -> float:
    """Bytes of memory that nobody uses; without end where the system does not say."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")
