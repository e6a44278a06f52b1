"""Sums over heads, queries or lines that are the same to the last bit whatever the slot.

torch may add in another order at the end of a row than inside it. Then tokens that got the same
from every head would differ in the last bit of the sum, and which of them goes would hang on where
they lie instead of on their age.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["TILE", "mean_over", "sum_over", "whole_tiles"]

#: Slots that products of matrices take at once, or a part of them that goes into all of them.
TILE = 16


def sum_over(tensor: Tensor, dim: int) -> Tensor:
    """The sum over one dimension, halves added element by element until one is left.

    Args:
        tensor: floating point, with at least one entry along ``dim``.
        dim: the dimension that goes.

    Returns:
        The tensor without that dimension; a view of it where there was only one entry.
    """
    left = tensor.shape[dim]
    while left > 1:
        half = left // 2
        added = tensor.narrow(dim, 0, half) + tensor.narrow(dim, half, half)
        if left % 2:
            added.narrow(dim, 0, 1).add_(tensor.narrow(dim, left - 1, 1))
        tensor, left = added, half
    return tensor.select(dim, 0)


def mean_over(tensor: Tensor, dim: int) -> Tensor:
    """The mean over one dimension: :func:`sum_over`, divided."""
    count = tensor.shape[dim]
    total = sum_over(tensor, dim)
    return total if count == 1 else total / count


def whole_tiles(tensor: Tensor, dim: int) -> Tensor:
    """Slots of zeros behind the others, so that none lies at the edge of a product.

    A product of matrices adds in another order where a tile of it is not whole (seen in MKL, with
    AVX2 and AVX-512).

    Args:
        tensor: floating point.
        dim: the slots' dimension, counted from the end (-1 is the last).
    """
    missing = -tensor.shape[dim] % TILE
    return functional.pad(tensor, (0, 0) * (-dim - 1) + (0, missing)) if missing else tensor
