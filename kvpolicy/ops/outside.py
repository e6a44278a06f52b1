"""Which tokens lie outside of a span of positions: what most policies protect, in two numbers.

Anchors are ``position < first``, the recent ones ``position >= last``. On a GPU each comparison,
and each ``|`` between them, would be a launch in every decision, where the kernel that ranks needs
no more than the two numbers. So there the mask keeps them, and is worked out where anything else
looks at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kvpolicy.ops import triton

__all__ = ["NO_FIRST", "NO_LAST", "Outside", "outside"]

#: Below every position, and above: positions are less than ``2**30``, and -1 where a slot is empty.
NO_FIRST, NO_LAST = -(2**31), 2**31 - 1

_UNITES: tuple[Callable[..., Any], ...] = (
    *(Tensor.__or__, Tensor.bitwise_or, torch.bitwise_or),
    *(Tensor.logical_or, torch.logical_or),
)


def outside(positions: Tensor, *, first: int = NO_FIRST, last: int = NO_LAST) -> Tensor:
    """``(position < first) | (position >= last)``, bool ``[B, H, S]``.

    Args:
        positions: int32 ``[B, H, S]``, -1 = empty.
        first: tokens before it are in.
        last: tokens from it on are in.

    Returns:
        The mask; on a GPU an :class:`Outside`, which is not worked out until somebody looks.
    """
    if triton.ranks(positions):
        return Outside(positions, first, last)
    return _compared(positions, first, last)


def _compared(positions: Tensor, first: int, last: int) -> Tensor:
    if last == NO_LAST:
        return positions < first
    recent = positions >= last
    return recent if first == NO_FIRST else recent | (positions < first)


class Outside(Tensor):
    """A mask of bool ``[B, H, S]`` that is known by two numbers, and is a tensor to everybody else.

    The union of two of the same positions is one again. It is meant for the decision in which it
    was made: worked out later, it says what is true of the positions then.

    Attributes:
        held: the positions, int32 ``[B, H, S]``.
        first: tokens before it are in.
        last: tokens from it on are in.
    """

    held: Tensor
    first: int
    last: int

    @staticmethod
    def __new__(cls, held: Tensor, first: int, last: int) -> Outside:
        """A tensor without data: whoever looks for some comes through the two hooks below."""
        mask: Outside = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=torch.bool, device=held.device
        )
        return mask

    def __init__(self, held: Tensor, first: int, last: int) -> None:
        self.held, self.first, self.last = held, first, last

    def mask(self) -> Tensor:
        """It, worked out."""
        with torch._C.DisableTorchFunctionSubclass():
            return _compared(self.held, self.first, self.last)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _UNITES and len(args) == 2 and not kwargs:
            one, other = args
            if type(one) is type(other) is Outside and one.held is other.held:
                first, last = max(one.first, other.first), min(one.last, other.last)
                return Outside(one.held, first, last)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_worked_out, args), **tree_map(_worked_out, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_worked_out, args), **tree_map(_worked_out, kwargs or {}))


def _worked_out(value: Any) -> Any:
    return value.mask() if type(value) is Outside else value
