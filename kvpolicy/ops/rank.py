"""Ranking: from what tokens are worth to the slots that go, worst first, ties decided alike."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.errors import ShapeError
from kvpolicy.ops import triton
from kvpolicy.ops.cpu import native
from kvpolicy.ops.outside import Outside

__all__ = ["leveled", "lowest", "numbers_only", "oldest_of_lowest"]

#: Scores beyond this tie with it, so that there is room above for what is protected.
_ROOF = torch.finfo(torch.float32).max / 4
#: Ranks are below this, and so are positions: what is protected ranks above by as much.
_RANKS = 1 << 30


def lowest(
    score: Tensor,
    positions: Tensor,
    count: int,
    *,
    protected: Tensor | None = None,
    pinned: Tensor | None = None,
    prefix: int = 0,
    may_be_empty: bool = True,
) -> tuple[Tensor, bool]:
    """The slots with the lowest scores; of equal scores the older position goes first.

    Empty slots go before any token, protected tokens after all others (by position, for beside what
    lifts them scores are small), and what is pinned last of all. Beyond a quarter of the largest
    float32, scores tie.

    Args:
        score: what each token is worth, broadcastable to ``[B, H, S]``; or, in int32, its rank:
            distinct within a head, from 0 to below ``2**30``, so that there are no ties to break
            and no NaN.
        positions: ``[B, H, S]``, int32, -1 = empty.
        count: how many slots are wanted.
        protected: bool, broadcastable to ``[B, H, S]``.
        pinned: the same; None where what is pinned lies in the first slots.
        prefix: how many of the first slots are pinned.
        may_be_empty: whether to look for empty slots at all.

    Returns:
        Slots, int64 ``[B, H, count]``, worst first, and whether every score that counts is a number
        (those of pinned and of empty slots do not). On a device other than the CPU that is asserted
        there instead, so that nobody waits for it; what is NaN then goes first.

    Raises:
        ShapeError: ``protected`` is not bool.
    """
    span = None
    if type(protected) is Outside:
        if protected.held is positions and triton.ranks(positions):
            span = protected.first, protected.last
        else:
            protected = protected.mask()
    elif protected is not None and protected.dtype is not torch.bool:
        raise ShapeError(f"protected must be bool, not {protected.dtype}")
    if score.dtype is not torch.int32:
        score = score.to(torch.float32)
    kernel = native.serving("lowest", score)
    if kernel is not None:
        found: tuple[Tensor, bool] = kernel(
            score, protected, positions, pinned, prefix, may_be_empty, count
        )
        return found
    on_gpu = triton.lowest(score, positions, count, span or protected, pinned, prefix)
    if on_gpu is not None:
        return on_gpu, True
    level = leveled(
        score,
        positions,
        protected=protected,
        pinned=pinned,
        prefix=prefix,
        may_be_empty=may_be_empty,
    )
    if level.dtype is torch.int32:
        # Slots that are empty, or pinned, tie: which of them comes first does not matter.
        return level.topk(count, dim=-1, largest=False, sorted=True).indices, True
    numbers = numbers_only(level)
    if count == 1:
        return oldest_of_lowest(level, positions), numbers
    order = _sortable(level, positions)
    return order.topk(count, dim=-1, largest=False, sorted=True).indices, numbers


def leveled(
    score: Tensor,
    positions: Tensor,
    *,
    protected: Tensor | None = None,
    pinned: Tensor | None = None,
    prefix: int = 0,
    may_be_empty: bool = True,
) -> Tensor:
    """A copy of the scores that says by itself what goes first: see :func:`lowest`.

    Empty slots have minus infinity, protected tokens stand above all others, and what is pinned
    has infinity; for ranks in int32, -1 and the largest integer.
    """
    ranks = score.dtype is torch.int32
    score = score.expand_as(positions)
    level = score.clone() if ranks else score.clamp(-_ROOF, _ROOF)
    if protected is not None:
        # Arithmetic without a branch: a CPU's ``masked_fill`` and ``where`` branch at every
        # element, and with a mask as irregular as slots are, that took four times as long.
        level.add_(protected, alpha=_RANKS if ranks else 2.5 * _ROOF)
    last = torch.iinfo(torch.int32).max if ranks else torch.inf
    if pinned is not None:
        level.masked_fill_(pinned, last)
    elif prefix:
        level[..., :prefix].fill_(last)
    if may_be_empty:
        level.masked_fill_(positions < 0, -1 if ranks else -torch.inf)
    return level


def numbers_only(level: Tensor) -> bool:
    """Whether no score is NaN; asserted on the device, so that nobody waits, if not on a CPU."""
    least = level.amin(-1)  # NaN where any score is
    if least.device.type != "cpu":
        torch._assert_async(~least.isnan().any())
        return True
    return not bool(least.isnan().any())


def oldest_of_lowest(level: Tensor, positions: Tensor) -> Tensor:
    """The slot with the lowest score, of equals the one with the oldest position; NaN is lowest.

    Args:
        level: ``[B, H, S]``, float32.
        positions: ``[B, H, S]``, int32.

    Returns:
        int64 ``[B, H, 1]``.
    """
    least = level.amin(-1, keepdim=True)
    # Nothing equals NaN, so every slot would tie with it, what is pinned too.
    least = least.masked_fill(least.isnan(), -torch.inf)
    # No sequence is as long as what is added.
    return torch.add(positions, level > least, alpha=1 << 30).argmin(-1, keepdim=True)


def _sortable(level: Tensor, positions: Tensor) -> Tensor:
    """One int64 a slot that orders by score, then by position; NaN comes first.

    A single integer key makes the choice exact on every device, where sorts of floats may break
    ties as they like. IEEE floats order like sign-magnitude integers, so flipping the lower 31
    bits of the negative ones makes their bits order like the floats.
    """
    level = level + 0.0  # turns -0.0 into 0.0, which must tie with it
    bits = level.nan_to_num_(-torch.inf, torch.inf, -torch.inf).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(torch.int64).bitwise_left_shift_(32).add_(positions)
