"""What a line looked at moves down with the lines."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.layout import refuse_other_orders
from kvpolicy.ops import moving
from kvpolicy.parts.named import register_part
from kvpolicy.policy.view import CacheView

__all__ = ["moved_mass", "moving_mass"]


def moved_mass(view: CacheView, lines: int) -> Tensor:
    """The mass observed, moved down by 0 to ``lines`` lines, ``[B, H, 1 + lines, S]``.

    A token gets the mass of the token of its column that many lines above; 0 where that one is not
    cached, or lies in the prefix, which is no part of the image. Empty slots get 0.

    Raises:
        LayoutError: tokens don't come line by line.
    """
    refuse_other_orders(view.layout, "mass that moves down the lines")
    return moving.moved(
        view.mass,
        view.positions,
        lines=lines,
        line_length=view.layout.line_length,
        prefix=view.layout.prefix,
        seen=view.seen,
    )


@register_part("score", "moving_mass", raster_only=True)
def moving_mass(
    view: CacheView,
    shift: Annotated[float, Field(ge=0, le=100, description="weight of the mass a line above")] = (
        0.5
    ),
) -> Tensor:
    """A token's mass, and that of the token a line above it, which the next line will move on to.

    ``score(j) = mass(j) + shift * mass(above j)``, where what is above is the token of the same
    column one line up; 0 where that one is not cached.

    Returns:
        ``[B, H, S]``.
    """
    return torch.add(view.mass, moved_mass(view, 1)[:, :, 1], alpha=shift)
