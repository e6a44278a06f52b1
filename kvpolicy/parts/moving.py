"""What a line looked at moves down with the lines."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.ops import moving as ops
from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Score
from kvpolicy.policy.view import CacheView

__all__ = ["MovingMass", "moved"]


def moved(view: CacheView, lines: int) -> Tensor:
    """The mass observed, moved down by 0 to ``lines`` lines, ``[B, H, 1 + lines, S]``.

    A token gets the mass of the token of its column that many lines above; 0 where that one is not
    cached, or lies in the prefix, which is no part of the image. Empty slots get 0.
    """
    layout = view.layout
    return ops.moved(
        view.mass,
        view.positions,
        lines=lines,
        line_length=layout.line_length,
        prefix=layout.prefix,
        seen=view.seen,
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
