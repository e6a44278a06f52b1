"""Items: the images that are asked for, one by one, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpolicy.errors import ParameterError

__all__ = ["Item", "class_items", "classes_of"]

#: Random numbers come in steps of 2**-48, so that none of them rounds up to 1.
_STEPS = 2**48


@dataclass(frozen=True)
class Item:
    """One image that is to be drawn.

    Attributes:
        path: of its picture, below the folder.
        row: the class, or the place of the prompt in its file, from 0.
        sample: which of the images of that class or prompt, from 0.
        prompt: the text; None for a class.
        about: what else its file says of the prompt.
    """

    path: str
    row: int
    sample: int
    prompt: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def chances(self, seed: int, count: int) -> NDArray[np.float64]:
        """Random numbers from 0 up to 1, ``[count]``, that depend on the seed and this item only.

        The first ``n`` are the same however many are asked for.
        """
        generator = np.random.default_rng([seed, self.row, self.sample])
        return generator.integers(0, _STEPS, size=count) / _STEPS


def class_items(classes: Sequence[int], per_class: int) -> list[Item]:
    """Images of classes, numbered as evaluators of folders want them, the classes in turn.

    Whoever needs only the first of them gets all classes alike.

    Args:
        classes: which.
        per_class: images of each.
    """
    count = len(classes)
    return [
        Item(path=f"images/{sample * count + place:06d}.png", row=number, sample=sample)
        for sample in range(per_class)
        for place, number in enumerate(classes)
    ]


def classes_of(text: str) -> list[int]:
    """``0-3,7`` as ``[0, 1, 2, 3, 7]``.

    Raises:
        ParameterError: it is malformed, or a class comes twice.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ParameterError(f"classes={text!r}: {part!r} is no class and no range like 0-999")
        low, high = int(first), int(last or first)
        if high < low:
            raise ParameterError(f"classes={text!r}: {part.strip()!r} runs backwards")
        found.extend(range(low, high + 1))
    if len(set(found)) != len(found):
        twice = next(number for number in found if found.count(number) > 1)
        raise ParameterError(f"classes={text!r}: class {twice} comes twice; see --per-class")
    return found
