"""Lots: a fixed random number for each position of each head, whatever the device or the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.cpu import native

__all__ = ["priorities"]


def priorities(positions: Tensor, seed: int) -> Tensor:
    """A hash of seed, head and position, evenly spread.

    Args:
        positions: ``[B, H, S]``, int32.
        seed: of head 0; head h has ``seed + h``.

    Returns:
        ``[B, H, S]``, integers in [0, 2**24), which float32 holds exactly.
    """
    served = native.serving("priorities", positions)
    if served is not None:
        drawn: Tensor = served(positions, seed)
        return drawn
    heads = torch.arange(seed, seed + positions.shape[1], device=positions.device)
    return (_mix(heads.view(1, -1, 1) * 1_000_003 + positions) >> 40).to(torch.float32)


def _mix(key: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014): int64 to int64 in [0, 2**64 / 2)."""
    key = key * -7046029254386353131
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (key ^ ((key >> 31) & 0x1FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF
