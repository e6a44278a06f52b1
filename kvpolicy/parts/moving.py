"""What a line looked at moves down with the lines."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.composition import Score
from kvpolicy.parts.named import register_part
from kvpolicy.view import CacheView

__all__ = ["MovingMass", "moved"]


def moved(view: CacheView, lines: int) -> Tensor:
    """The mass observed, moved down by some lines, ``[B, H, S]``.

    A token gets the mass of the token of its column that many lines above; 0 where that one is not
    cached, or lies in the prefix, which is no part of the image. Empty slots get 0.
    """
    if lines == 0:
        return view.mass.masked_fill(view.empty, 0.0) if view.may_be_empty else view.mass
    # By position: slots are in no order. Empty slots write to place 0, which nobody reads.
    places = (view.positions + 1).long()
    table = view.mass.new_zeros(*places.shape[:2], view.seen + 1)
    table.scatter_(2, places, view.mass)
    table[..., : view.layout.prefix + 1] = 0.0
    return table.gather(2, (places - lines * view.layout.line_length).clamp(min=0))


@register_part("moving_mass")
class MovingMass(Score):
    """A token's mass, and that of the token a line above it, which the next line will move on to.

    ``score(j) = mass(j) + shift * mass(above j)``, where what is above is the token of the same
    column one line up; 0 where that one is not cached.
    """

    needs_mass: ClassVar[bool] = True

    shift: float = Field(0.5, ge=0, le=100, description="weight of the mass a line above")

    def worth(self, view: CacheView) -> Tensor:
        """By position."""
        return torch.add(view.mass, moved(view, 1), alpha=self.shift)
