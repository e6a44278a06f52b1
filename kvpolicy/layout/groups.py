"""How many tokens come at once: group sizes that grow like a cosine, with an exact total."""

from __future__ import annotations

import math

from kvpolicy.errors import ParameterError

__all__ = ["coarse_passes", "group_sizes", "split_groups"]


def group_sizes(total: int, passes: int) -> tuple[int, ...]:
    """Sizes of the groups in which ``total`` tokens come in ``passes`` passes, the smallest first.

    ``size_t = round(total * (cos(pi/2 * t/passes) - cos(pi/2 * (t+1)/passes)))``, at least 1, and 1
    for the first group, which has nothing to look at (the schedule of MaskGIT, arXiv:2202.04200, as
    locality-aware parallel decoding uses it, arXiv:2507.01957, section 3.3). What rounding leaves
    over is taken from the largest groups or given to the largest but one, so that sizes never fall.
    The published schedules of 16 x 16 tokens in 20 and 32 passes and of 32 x 32 in 48 come out.

    Example:
        >>> group_sizes(256, 20)
        (1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20)

    Args:
        total: tokens of an image.
        passes: forward passes, from 1 to ``total``.

    Raises:
        ParameterError: passes are fewer than 1 or more than there are tokens.
    """
    if not 1 <= passes <= total:
        raise ParameterError(
            f"group_sizes: passes={passes}: from 1 (all tokens at once) to {total} (one at a time) "
            f"for {total} tokens"
        )
    if passes == 1:
        return (total,)
    known = [total * (1 - math.cos(math.pi / 2 * step / passes)) for step in range(passes + 1)]
    sizes = [1] + [max(1, round(known[t + 1] - known[t])) for t in range(1, passes)]
    while (spare := sum(sizes) - total) > 0:
        largest = sizes[-1]
        first = sizes.index(largest)
        for group in range(first, min(passes, first + spare)):
            sizes[group] -= 1
    while sum(sizes) < total:
        smaller = [group for group in range(1, passes) if sizes[group] < sizes[-1]]
        sizes[smaller[-1] if smaller else -1] += 1
    return tuple(sizes)


def coarse_passes(total: int, passes: int) -> int:
    """The most passes, of at most so many, in which the third group has more than one token.

    In groups of one, each token of a locality-aware order lies beside the one before, so that an
    image that begins with many of them grows from a single place (see docs/parallel.md).

    Example:
        >>> coarse_passes(784, 48), coarse_passes(784, 128)
        (48, 56)
    """

    def third(passes: int) -> float:
        begin, end = (math.cos(math.pi / 2 * step / passes) for step in (2, 3))
        return total * (begin - end)

    while passes > 3 and round(third(passes)) <= 1:
        passes -= 1
    return passes


def split_groups(groups: tuple[int, ...], passes: int) -> tuple[int, ...]:
    """Groups in more passes, in the same order: each is split into about as many equal parts.

    Example:
        >>> split_groups((1, 3, 6), 6)
        (1, 1, 2, 2, 2, 2)

    Args:
        groups: sizes.
        passes: from as many as there are groups to as many as there are tokens.
    """
    parts = [1] * len(groups)
    while (missing := passes - sum(parts)) > 0:
        fewest = min(n for n, size in zip(parts, groups, strict=True) if n < size)
        least = [i for i, size in enumerate(groups) if parts[i] == fewest < size]
        for group in least[-missing:]:
            parts[group] += 1
    return tuple(
        size // count + (part >= count - size % count)
        for size, count in zip(groups, parts, strict=True)
        for part in range(count)
    )
