"""What a line looked at moves down with the lines."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Score
from kvpolicy.policy.view import CacheView

__all__ = ["MovingMass", "moved"]


def moved(view: CacheView, lines: int) -> Tensor:
    """The mass observed, moved down by 0 to ``lines`` lines, ``[B, H, 1 + lines, S]``.

    A token gets the mass of the token of its column that many lines above; 0 where that one is not
    cached, or lies in the prefix, which is no part of the image. Empty slots get 0.
    """
    mass, layout = view.mass, view.layout
    # By position: slots are in no order. Empty slots write to place 0, which nobody reads.
    places = (view.positions + 1).long()
    table = mass.new_zeros(*places.shape[:2], view.seen + 1)
    table.scatter_(2, places, mass)
    table[..., : layout.prefix + 1] = 0.0
    down = torch.arange(1, lines + 1, device=mass.device) * layout.line_length
    above = (places.unsqueeze(2) - down.view(-1, 1)).clamp_(min=0)
    own = mass.masked_fill(view.empty, 0.0) if view.may_be_empty else mass
    return torch.cat(
        [own.unsqueeze(2), table.unsqueeze(2).expand(-1, -1, lines, -1).gather(3, above)], 2
    )


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
        return torch.add(view.mass, moved(view, 1)[:, :, 1], alpha=self.shift)
