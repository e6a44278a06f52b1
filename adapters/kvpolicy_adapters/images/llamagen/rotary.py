"""LlamaGen's rotation of queries and keys: half of a head's pairs by row, the other half by column.

The tokens of the condition are not rotated but zeroed: the released models were trained with a
table whose entries for them are zero. Their keys score 0 with every query, and their queries, which
are zero too, weigh all that they see alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate", "rotation_table"]


def rotation_table(
    grid_size: int, head_dim: int, *, prefix: int, base: float, device: torch.device
) -> Tensor:
    """Cosine and sine of each position's angles, float32 ``[prefix + n * n, head_dim // 2, 2]``.

    Pair i of row r turns by ``r / base ** (4i / head_dim)`` for the first half of the pairs, and
    by the same of the column for the second half (LlamaGen, arXiv:2406.06525).

    Args:
        grid_size: rows, and columns, n.
        head_dim: dimensions of a head, a multiple of 4.
        prefix: tokens of the condition, whose entries are zero.
        base: base of the frequencies.
        device: where the table lies.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, device=device).float() / half
    place = torch.arange(grid_size, device=device)
    angle = torch.outer(place, 1.0 / base**exponent)
    size = (grid_size, grid_size, half // 2)
    angles = torch.cat([angle[:, None].expand(size), angle[None, :].expand(size)], dim=-1)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(0, 1)
    return torch.cat([image.new_zeros(prefix, half, 2), image])


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of dimensions, in float32.

    Args:
        heads: ``[B, T, H, D]``.
        rotation: rows of the table, ``[T, D // 2, 2]``.

    Returns:
        ``[B, T, H, D]``, in the dtype of ``heads``.
    """
    first, second = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.unsqueeze(1).unbind(-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(heads)
