"""How many sequences fit: the largest batch of each contender within so much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpolicy.lab.bench.contender import Dimensions
from kvpolicy.lab.bench.peers import PeerError

__all__ = ["Fit", "Largest", "largest_batch"]

#: What processes say when memory ends, in small letters: torch on CUDA, on a CPU, Python, C++.
_FULL = ("out of memory", "can't allocate memory", "memoryerror", "bad_alloc")


@dataclass(frozen=True)
class Largest:
    """The largest batch of one contender.

    Attributes:
        batch: sequences; 0 where not even one fits.
        used: bytes of weights and of growth, at that batch.
    """

    batch: int
    used: int


@dataclass(frozen=True)
class Fit:
    """Within how much memory, and how many fit.

    Attributes:
        limit: bytes, weights included.
        largest: by contender.
    """

    limit: int
    largest: dict[str, Largest]


def largest_batch(
    grown: Callable[[int], int], dimensions: Dimensions, width: int, limit: int
) -> Largest:
    """Double the batch until it does not fit, then halve the gap until it is a sixteenth.

    Args:
        grown: bytes by which a process grows that decodes a batch of this size; it may raise
            :class:`PeerError` where memory ends before ``limit`` does.
        dimensions: of the model, whose weights count.
        width: bytes of a number.
        limit: bytes.

    Raises:
        PeerError: a process failed for another reason.
    """
    weights = (dimensions.step_weights + dimensions.hidden * dimensions.vocab) * width

    def used(batch: int) -> int | None:
        """Bytes in all; None where it does not fit."""
        try:
            total = weights + grown(batch)
        except PeerError as error:
            if any(said in str(error).lower() for said in _FULL):
                return None
            raise
        return total if total <= limit else None

    best = Largest(0, 0)
    if weights > limit:
        return best
    too_many = 1
    while (found := used(too_many)) is not None:
        best = Largest(too_many, found)
        too_many *= 2
    while too_many - best.batch > max(1, best.batch // 16):
        middle = (best.batch + too_many) // 2
        found = used(middle)
        if found is None:
            too_many = middle
        else:
            best = Largest(middle, found)
    return best
