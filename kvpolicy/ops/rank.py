"""From what tokens are worth to the slots that go: fast ways of ranking that break ties alike.

Empty slots go before any token, protected tokens after all others, and the prefix last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.cpu import native
from kvpolicy.policy.view import CacheView

__all__ = ["first", "in_one_pass", "lift", "lowest", "sortable", "without_nan"]

#: Scores beyond this tie with it, so that there is room above for what is protected.
_ROOF = torch.finfo(torch.float32).max / 4


def in_one_pass(
    score: Tensor, protected: Tensor | None, view: CacheView, count: int
) -> tuple[Tensor, bool] | None:
    """What the functions below choose together, by the CPU kernel; None where it does not serve.

    Args:
        score: what each token is worth, ``[B, H, S]``, float32; or ranks, int32 (see ``first``).
        protected: what goes after all that is not, bool ``[B, H, S]``; None for nothing.
        view: the layer.
        count: how many slots are wanted.

    Returns:
        Slots, int64 ``[B, H, count]``, worst first, and whether every score is a number.
    """
    positions = view.positions
    if score.shape != positions.shape or score.dtype not in (torch.float32, torch.int32):
        return None
    masks = () if protected is None else (protected,)
    kernel = native.chooser("lowest", score, positions, *masks)
    if kernel is None or (protected is not None and protected.dtype is not torch.bool):
        return None
    pinned = view.pinned if view.may_be_empty else None
    found: tuple[Tensor, bool] = kernel(
        score, protected, positions, pinned, view.layout.prefix, count
    )
    return found


def lift(score: Tensor, protected: Tensor | None) -> Tensor:
    """A copy of the score in which whatever is protected stands above all that is not.

    Arithmetic without a branch: a CPU's ``masked_fill`` and ``where`` branch at every element, and
    with a mask as irregular as slots are, that took four times as long.
    """
    score = score.clamp(-_ROOF, _ROOF)
    return score if protected is None else score.add_(protected, alpha=2.5 * _ROOF)


def without_nan(least: Tensor) -> Tensor:
    """Lowest scores that ``lowest`` can use where one is NaN: that one then goes first.

    Nothing equals NaN, so every slot would tie with it, the prefix too.
    """
    return least.masked_fill(least.isnan(), -torch.inf)


def lowest(score: Tensor, position: Tensor, least: Tensor) -> Tensor:
    """The slot with the lowest score, the oldest among equals: what ``sortable`` ranks first.

    ``least`` is the lowest score of each head; see ``without_nan``.
    """
    # No sequence is as long as what is added.
    return torch.add(position, score > least, alpha=1 << 30).argmin(-1, keepdim=True)


def first(rank: Tensor, protected: Tensor | None, view: CacheView, count: int) -> Tensor:
    """The slots that rank lowest, of distinct integers below ``2**30``; empty slots come first."""
    found = in_one_pass(rank, protected, view, count)
    if found is not None:
        return found[0]
    last = torch.iinfo(torch.int32).max
    if protected is not None:
        rank = torch.add(rank, protected, alpha=1 << 30)
    if view.may_be_empty:
        rank = rank.masked_fill(view.empty, -1).masked_fill_(view.pinned, last)
    elif view.layout.prefix:
        rank = rank.clone() if protected is None else rank
        rank[..., : view.layout.prefix].fill_(last)
    if count == 1:
        return rank.argmin(-1, keepdim=True)
    return rank.topk(count, dim=-1, largest=False, sorted=True).indices


def sortable(score: Tensor, position: Tensor) -> Tensor:
    """One int64 a slot that orders by score, then by position; NaN comes first.

    A single integer key makes the choice exact on every device, where sorts of floats may break
    ties as they like. IEEE floats order like sign-magnitude integers, so flipping the lower 31
    bits of the negative ones makes their bits order like the floats.
    """
    score = score + 0.0  # turns -0.0 into 0.0, which must tie with it
    bits = score.nan_to_num_(-torch.inf, torch.inf, -torch.inf).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(torch.int64).bitwise_left_shift_(32).add_(position)
