"""Cases without their whole product: the last of their axes takes its values in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

__all__ = ["in_turn"]


def in_turn(*axes: Iterable[Any], turn: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every combination of ``axes``, each with one value of ``turn``.

    Of two axes or more, each value meets every value of ``turn``, and neighbours another one. For
    tests in which what ``turn`` says has nothing to do with how the others go together.

    Example:
        >>> in_turn("ab", [1, 2], turn=["lazy", "eager"])
        [('a', 1, 'lazy'), ('a', 2, 'eager'), ('b', 1, 'eager'), ('b', 2, 'lazy')]
    """
    return [
        (*(value for _, value in chosen), turn[sum(place for place, _ in chosen) % len(turn)])
        for chosen in product(*(list(enumerate(axis)) for axis in axes))
    ]
