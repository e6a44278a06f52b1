"""How much of what a key says other keys say as well (R-KV, arXiv:2505.24133, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.cpu import native
from kvpolicy.ops.portions import NEAR, portions
from kvpolicy.ops.sums import TILE, whole_tiles

__all__ = ["cosines", "redundancy"]


def redundancy(keys: Tensor, positions: Tensor, out: Tensor, *, similar: float) -> Tensor:
    """Softmax over a head's tokens of each key's mean cosine with the others.

    Args:
        keys: ``[B, H, S, D]``.
        positions: ``[B, H, S]``, int32, -1 = empty.
        out: slots that no key is compared with, bool ``[B, H, S]``; empty ones must be.
        similar: cosine above which two keys are alike. Each token leaves out the newest of those
            that are like it: of many alike, the newest stays.

    Returns:
        ``[B, H, S]``, float32, 0 where a slot is out.
    """
    served = _serving("redundancy", keys)
    if served is not None:
        in_one_pass: Tensor = served(keys, positions, out, similar)
        return in_one_pass
    mean = cosines(keys, positions, out, similar=similar)
    mean = mean / (~out).sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(out, torch.finfo(torch.float32).min).softmax(-1).masked_fill(out, 0.0)


def cosines(keys: Tensor, positions: Tensor, out: Tensor, *, similar: float) -> Tensor:
    """Sum of each key's cosines with the others; arguments as in :func:`redundancy`.

    Returns:
        ``[B, H, S]``, float32; what slots that are out get means nothing.
    """
    served = _serving("cosines", keys)
    if served is not None:
        in_one_pass: Tensor = served(keys, positions, out, similar)
        return in_one_pass
    keys = keys.to(torch.float32)
    length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_(min=1e-8)
    # What is out has no length, and so is like none.
    keys = whole_tiles(keys * (~out).unsqueeze(-1).to(torch.float32).div_(length), -2)
    total = keys.new_zeros(keys.shape[:3])
    own = torch.zeros_like(total)
    newer = whole_tiles((positions + 1).unsqueeze(2), -1)
    slots = positions.shape[-1]
    heads, padded = total.shape[1:]
    rows = max(NEAR // (heads * padded) // TILE, 1) * TILE
    for part in portions(len(keys), heads * padded**2, keys.device):
        for first in range(0, slots, rows):
            added, itself = _added_by(keys[part], newer[part], first, rows, similar)
            total[part] += added
            own[part, :, first : first + rows] = itself
    # Taken off behind the sum: equal keys have their own cosine at different places of it.
    return (total - own)[..., :slots]


def _serving(name: str, keys: Tensor) -> native.Kernel | None:
    return native.serving(name, keys) if keys.dtype in native.DTYPES else None


def _added_by(
    keys: Tensor, newer: Tensor, first: int, rows: int, similar: float
) -> tuple[Tensor, Tensor]:
    """What some tokens add to the cosines of all, and their own: ``[b, H, S]``, ``[b, H, R]``."""
    cosine = keys[:, :, first : first + rows] @ keys.transpose(2, 3)
    own = cosine.diagonal(first, dim1=2, dim2=3)
    itself = own.clone()
    own.zero_()
    newest, place = (newer * (cosine > similar)).max(-1, keepdim=True)
    cosine.scatter_(3, place, cosine.gather(3, place).masked_fill_(newest > 0, 0.0))
    own.add_(itself)
    return (cosine.new_ones(1, cosine.shape[2]) @ cosine).squeeze(2), itself
