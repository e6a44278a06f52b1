"""Policies whose decisions both halves under guidance share, to measure whether that pays.

A batch is a conditional half, and an unconditional half of as many sequences behind it. The halves
hold the same positions in the same slots as long as they always give up the same ones.
"""

from __future__ import annotations

from torch import Tensor

from kvpolicy import CacheView
from kvpolicy.policies.linear import Linear
from kvpolicy.policies.linear2d import Linear2D

__all__ = ["Linear2DOfConditional", "LinearOfBoth", "LinearOfConditional"]


def of_conditional(slots: Tensor) -> Tensor:
    """What the conditional half gives up, for both; slots ``[2B, H, count]``."""
    return slots[: len(slots) // 2].repeat(2, 1, 1)


class LinearOfConditional(Linear):
    """``linear``; the unconditional half gives up what the conditional one does."""

    def victims(self, view: CacheView, count: int) -> Tensor:
        return of_conditional(super().victims(view, count))


class LinearOfBoth(Linear):
    """``linear``; both halves give up what has the least mass in the two together."""

    def score(self, view: CacheView) -> Tensor:
        half = len(view.mass) // 2
        return (view.mass[:half] + view.mass[half:]).repeat(2, 1, 1)


class Linear2DOfConditional(Linear2D):
    """``linear2d``; the unconditional half gives up what the conditional one does."""

    def victims(self, view: CacheView, count: int) -> Tensor:
        return of_conditional(super().victims(view, count))
