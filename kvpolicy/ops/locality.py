"""Which heads look at what is near."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.ops.cpu import native

__all__ = ["is_local"]


def is_local(
    mass: Tensor,
    positions: Tensor,
    *,
    seen: int,
    window: int,
    share: float,
    pinned: Tensor | None = None,
    prefix: int = 0,
    may_be_empty: bool = True,
) -> Tensor:
    """Whether the newest tokens get at least a share of what a head's query gives on average.

    A token has had as many queries as it is old, so its mass from one of them is ``mass / age``.

    Args:
        mass: of all queries so far, ``[B, H, S]``, float32.
        positions: ``[B, H, S]``, int32, -1 = empty.
        seen: tokens of the sequence so far.
        window: how many tokens are the newest.
        share: of what they get, from 0 to 1.
        pinned: tokens that do not count, bool, broadcastable to ``[B, H, S]``; None where these lie
            in the first slots.
        prefix: how many of the first slots do not count.
        may_be_empty: whether slots can be empty; those don't count either.

    Returns:
        bool ``[B, H, 1]``.
    """
    served = native.serving("is_local", mass)
    if served is not None:
        in_one_pass: Tensor = served(
            mass, positions, pinned, prefix, may_be_empty, seen, window, share
        )
        return in_one_pass
    age = seen - positions
    by_query = mass / age
    if pinned is not None:
        by_query.masked_fill_(pinned, 0.0)
    elif prefix:
        by_query[..., :prefix] = 0.0
    if may_be_empty:
        by_query.masked_fill_(positions < 0, 0.0)
    near = by_query * (age <= window)
    return near.sum(-1, keepdim=True) >= share * by_query.sum(-1, keepdim=True)
