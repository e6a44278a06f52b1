"""The slots that go, worst first, in one launch: levels, ties, NaN and order at once.

A head has 100 to 1,200 slots, and its order is what counts, not its sort: a slot's place is the
number of slots before it. Each program counts that for some slots of one head, comparing them with
all of the head's; the keys are those of :func:`kvpolicy.ops.rank.lowest`, whole numbers of 64 bits
that order by score and then by position, so that the choice is the same on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy.ops.triton.asserting import ASSERTING

__all__ = ["lowest_slots"]

_BLOCK = 64


def lowest_slots(
    score: Tensor,
    positions: Tensor,
    count: int,
    protected: Tensor | tuple[int, int] | None,
    pinned: Tensor | None,
    prefix: int,
) -> Tensor:
    """As :func:`kvpolicy.ops.rank.lowest` has it; NaN fails an assertion on the device.

    Args:
        score: float32, or int32 ranks, broadcastable to ``[B, H, S]``.
        positions: int32 ``[B, H, S]``, -1 = empty.
        count: how many slots are wanted.
        protected: bool, broadcastable to ``[B, H, S]``; or two numbers: positions before the first,
            and from the second on; None for nothing.
        pinned: the same; None where what is pinned lies in the first slots.
        prefix: how many of the first slots are pinned, where ``pinned`` is None.

    Returns:
        Slots, int64 ``[B, H, count]``.
    """
    batch, heads, slots = positions.shape
    victims = torch.empty(batch, heads, count, dtype=torch.int64, device=positions.device)
    score = score.expand_as(positions)
    masked = isinstance(protected, Tensor)
    kept = protected.expand_as(positions) if isinstance(protected, Tensor) else score
    first, last = protected if isinstance(protected, tuple) else (0, 0)
    held = score if pinned is None else pinned.expand_as(positions)
    _lowest[(batch * heads, triton.cdiv(slots, _BLOCK))](
        *(score, positions, kept, held, victims, heads, slots, count, prefix, first, last),
        *(*score.stride(), *positions.stride(), *kept.stride(), *held.stride()),
        BLOCK=_BLOCK,
        RANKS=score.dtype is torch.int32,
        MASKED=masked,
        SPANNED=protected is not None and not masked,
        PINNED=pinned is not None,
        num_warps=4,
        **ASSERTING,
    )
    return victims


@triton.jit
def _keys(
    score,
    positions,
    protected,
    pinned,
    slot,
    slots,
    prefix,
    first,
    last,
    score_s,
    positions_s,
    protected_s,
    pinned_s,
    RANKS: tl.constexpr,
    MASKED: tl.constexpr,
    SPANNED: tl.constexpr,
    PINNED: tl.constexpr,
):
    """What some slots of a head are ordered by, and which scores that count are NaN."""
    there = slot < slots
    position = tl.load(positions + slot * positions_s, mask=there, other=0)
    value = tl.load(score + slot * score_s, mask=there, other=0)
    empty = position < 0
    held = slot < prefix
    if PINNED:
        held = tl.load(pinned + slot * pinned_s, mask=there, other=0) != 0
    if MASKED:
        kept = tl.load(protected + slot * protected_s, mask=there, other=0) != 0
    elif SPANNED:
        kept = (position < first) | (position >= last)
    broken = value != value
    if RANKS:
        level = value.to(tl.int64)
        if MASKED or SPANNED:
            level += tl.where(kept, 1 << 30, 0)
        level = tl.where(held, 2147483647, level)
        level = tl.where(empty, -1, level)
    else:
        # Beyond a quarter of the largest float32 scores tie, to leave room for what is protected.
        value = tl.minimum(tl.maximum(value, -8.5070586659632215e37), 8.5070586659632215e37)
        if MASKED or SPANNED:
            value = value + tl.where(kept, 2.1267646664908054e38, 0.0)
        value = tl.where(broken, float("-inf"), value)
        value = tl.where(held, float("inf"), value)
        value = tl.where(empty, float("-inf"), value)
        value = tl.where(value == 0.0, 0.0, value)  # -0.0 must tie with it
        bits = value.to(tl.int32, bitcast=True)
        # Floats order like numbers with a sign; whole numbers are in two's complement.
        level = tl.where(bits < 0, bits ^ 2147483647, bits).to(tl.int64)
    return (level << 32) + position, broken & there & (held == 0) & (empty == 0)


@triton.jit(do_not_specialize=["slots", "count", "prefix", "first", "last"])
def _lowest(
    score,
    positions,
    protected,
    pinned,
    victims,
    heads,
    slots,
    count,
    prefix,
    first,
    last,
    score_b,
    score_h,
    score_s,
    positions_b,
    positions_h,
    positions_s,
    protected_b,
    protected_h,
    protected_s,
    pinned_b,
    pinned_h,
    pinned_s,
    BLOCK: tl.constexpr,  # slots that are ranked, and compared with, at once
    RANKS: tl.constexpr,  # scores are distinct whole numbers
    MASKED: tl.constexpr,  # what is protected lies in a mask
    SPANNED: tl.constexpr,  # or is what lies outside of two positions
    PINNED: tl.constexpr,
):
    """Some slots of one head of one sequence."""
    program = tl.program_id(0)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    score += b * score_b + h * score_h
    positions += b * positions_b + h * positions_h
    protected += b * protected_b + h * protected_h
    pinned += b * pinned_b + h * pinned_h
    own = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine, broken = _keys(
        score,
        positions,
        protected,
        pinned,
        own,
        slots,
        prefix,
        first,
        last,
        score_s,
        positions_s,
        protected_s,
        pinned_s,
        RANKS,
        MASKED,
        SPANNED,
        PINNED,
    )
    tl.device_assert(broken == 0, "a score is NaN")
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, slots, BLOCK):
        other = start + tl.arange(0, BLOCK)
        theirs, _ = _keys(
            score,
            positions,
            protected,
            pinned,
            other,
            slots,
            prefix,
            first,
            last,
            score_s,
            positions_s,
            protected_s,
            pinned_s,
            RANKS,
            MASKED,
            SPANNED,
            PINNED,
        )
        before = theirs[None, :] < mine[:, None]
        # Empty slots are alike, and so are pinned ones that have a rank: the first slot goes first.
        same = (theirs[None, :] == mine[:, None]) & (other[None, :] < own[:, None])
        counts = (before | same) & (other < slots)[None, :]
        place += tl.sum(counts.to(tl.int32), axis=1)
    tl.store(
        victims + (b * heads + h) * count + place,
        own.to(tl.int64),
        mask=(own < slots) & (place < count),
    )
