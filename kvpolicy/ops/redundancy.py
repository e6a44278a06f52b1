"""How much of what a key says other keys say as well (R-KV, arXiv:2505.24133, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.cpu import native
from kvpolicy.ops.portions import NEAR, portions
from kvpolicy.ops.sums import whole_tiles

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
    newer = (positions + 1).unsqueeze(2)
    newer = whole_tiles(newer, -1)
    heads, slots = positions.shape[1:]
    rows = max(NEAR // (heads * slots), 1)
    for part in portions(len(keys), heads * slots**2, keys.device):
        for first in range(0, slots, rows):
            total[part] += _added_by(keys[part], newer[part], first, rows, similar)
    return total[..., :slots]


def _serving(name: str, keys: Tensor) -> native.Kernel | None:
    return native.serving(name, keys) if keys.dtype in native.DTYPES else None


def _added_by(keys: Tensor, newer: Tensor, first: int, rows: int, similar: float) -> Tensor:
    """What some tokens add to the cosines of all: ``[b, H, S]``."""
    cosine = keys[:, :, first : first + rows] @ keys.transpose(2, 3)
    own = cosine.diagonal(first, dim1=2, dim2=3)
    itself = own.clone()
    own.zero_()
    newest, place = (newer * (cosine > similar)).max(-1, keepdim=True)
    cosine.scatter_(3, place, cosine.gather(3, place).masked_fill_(newest > 0, 0.0))
    # Taken off behind the sum: equal keys have their own cosine at different places of it.
    own.copy_(itself)
    added = (cosine.new_ones(1, cosine.shape[2]) @ cosine).squeeze(2)
    added[:, :, first : first + rows] -= itself
    return added
