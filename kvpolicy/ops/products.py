"""Skinny products: ``x W^T + b`` for a few rows x, at the speed at which the weights are read."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvpolicy.ops.cpu import native

__all__ = ["most_rows", "skinny_linear"]


def skinny_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """A function that gives what :func:`torch.nn.functional.linear` gives, in float32 on a CPU.

    It takes ``x [..., K]``, ``weight [N, K]`` and ``bias [N]`` or None. A sum is made in the same
    order whatever the number of rows, so a row gets the same numbers whoever its neighbours are.

    Returns:
        The function; None where the CPU kernel has not been built.
    """
    return native.linear()


def most_rows() -> int:
    """Rows up to which it is no slower than torch, as measured when the kernel was built."""
    return native.most_rows()
