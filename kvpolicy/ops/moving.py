"""What a line looked at moves down with the lines: mass by place in the image, not by slot."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["moved"]


def moved(
    mass: Tensor, positions: Tensor, *, lines: int, line_length: int, prefix: int, seen: int
) -> Tensor:
    """The mass, moved down by 0 to ``lines`` lines.

    A token gets the mass of the token of its column that many lines above; 0 where that one is not
    cached, or lies in the prefix, which is no part of the image. Empty slots get 0.

    Args:
        mass: ``[B, H, S]``, float32.
        positions: ``[B, H, S]``, int32, -1 = empty.
        lines: how far down.
        line_length: tokens from one line to the next.
        prefix: tokens before the first line.
        seen: tokens of the sequence so far; no position is higher.

    Returns:
        ``[B, H, 1 + lines, S]``, float32.
    """
    # By position: slots are in no order. Empty slots write to place 0, which nobody reads.
    places = (positions + 1).long()
    table = mass.new_zeros(*places.shape[:2], seen + 1)
    table.scatter_(2, places, mass)
    table[..., : prefix + 1] = 0.0
    down = torch.arange(1, lines + 1, device=mass.device) * line_length
    above = (places.unsqueeze(2) - down.view(-1, 1)).clamp_(min=0)
    own = mass.masked_fill(positions < 0, 0.0)
    return torch.cat(
        [own.unsqueeze(2), table.unsqueeze(2).expand(-1, -1, lines, -1).gather(3, above)], 2
    )
