"""linear2d: what a line looks at moves down with it."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.composition import Parts, Score
from kvpolicy.parts import Anchors, EachLine, RecentLines, WatchLine, register_part
from kvpolicy.policy import ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.view import CacheView

__all__ = ["Linear2D", "MovingMass"]


@register_part("moving_mass")
class MovingMass(Score):
    """A token's mass, and that of the token a line above it, which the next line will move on to.

    ``score(j) = mass(j) + shift * mass(above j)``, where what is above is the token of the same
    column one line up; 0 where that one is not cached.
    """

    needs_mass: ClassVar[bool] = True

    shift: float = Field(0.5, ge=0, le=100, description="weight of the mass a line above")

    def worth(self, view: CacheView) -> Tensor:
        """By position: slots are in no order."""
        line = view.layout.line_length
        places = (view.positions + 1).long()  # empty slots at 0, whose mass nobody reads
        table = view.mass.new_zeros(*places.shape[:2], view.seen + 1)
        table.scatter_(2, places, view.mass)
        table[..., 0] = 0.0
        # Above the first line lies the prefix, which is no part of the image.
        table[..., : view.layout.prefix + 1] = 0.0
        above = table.gather(2, (places - line).clamp(min=0))
        return torch.add(view.mass, above, alpha=self.shift)


@register("linear2d")
class Linear2D(ScoredPolicy):
    """``linear``, but what a line looked at one row up counts for what lies below it.

    ``score(j) = mass(j) + shift * mass(above j)`` with the mass of the last finished line, decided
    once a line, for one line. A head that looks two rows up will, one line later, look at the row
    below that one.

    It pays together with budgets by layer (:class:`kvpolicy.Calibrated`); with the same budget for
    every layer it is slightly worse than ``linear`` on fashion-ar.
    """

    anchors: int = Field(28, ge=0, description="first image tokens that are never evicted")
    recent_lines: int = Field(
        1, ge=0, description="finished lines that are kept whole, beside the current one"
    )
    shift: float = Field(0.5, ge=0, le=100, description="weight of the mass a line above")

    @cached_property
    def parts(self) -> Parts:
        """Those of ``linear``, but for the score."""
        return Parts(
            protect=(Anchors(count=self.anchors), RecentLines(count=self.recent_lines)),
            observe=WatchLine(),
            score=MovingMass(shift=self.shift),
            decide=EachLine(),
        )
