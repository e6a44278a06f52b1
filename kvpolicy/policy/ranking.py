"""From what tokens are worth to the slots that go, on a policy's view of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import AttentionError
from kvpolicy.ops import rank
from kvpolicy.policy.view import CacheView

__all__ = ["leveled", "lowest"]


def lowest(view: CacheView, count: int, score: Tensor, protected: Tensor | None) -> Tensor:
    """The slots with the lowest scores among the unprotected; of equals the older position first.

    Empty slots go before any token, the prefix after all others.

    Args:
        view: the layer.
        count: how many slots are wanted.
        score: what each token is worth, broadcastable to ``[B, H, S]``.
        protected: what may not go besides the prefix, bool ``[B, H, S]``; None for nothing.

    Returns:
        Slots, int64 ``[B, H, count]``, distinct within a head, worst first.

    Raises:
        AttentionError: a score is NaN (on a device other than the CPU it is asserted there, so that
            nobody waits for it); the prefix stays either way.
        ShapeError: ``protected`` is not bool.
    """
    # Positions are ranks already: distinct, so that no ties need be broken, and never NaN.
    if score is not view.positions:
        score = score.to(torch.float32)
    slots, numbers = rank.lowest(score, view.positions, count, protected=protected, **_pinned(view))
    if not numbers:
        raise _nan(view)
    return slots


def leveled(view: CacheView, score: Tensor, protected: Tensor | None) -> Tensor:
    """Scores that say by themselves what goes first, to choose a set by.

    Args:
        view: the layer.
        score: what each token is worth, broadcastable to ``[B, H, S]``.
        protected: what may not go besides the prefix, bool ``[B, H, S]``; None for nothing.

    Returns:
        float32 ``[B, H, S]``: minus infinity where a slot is empty, infinity for the prefix, above
        all others where a token is protected.

    Raises:
        AttentionError: a score is NaN; see :func:`lowest`.
    """
    level = rank.leveled(
        score.to(torch.float32), view.positions, protected=protected, **_pinned(view)
    )
    if not rank.numbers_only(level):
        raise _nan(view)
    return level


def _pinned(view: CacheView) -> dict[str, Any]:
    """Where the prefix lies, as :mod:`kvpolicy.ops` takes it."""
    return {
        # Where no slot was ever emptied, the prefix lies where it was put: in the first.
        "pinned": view.pinned if view.may_be_empty else None,
        "prefix": view.layout.prefix,
        "may_be_empty": view.may_be_empty,
    }


def _nan(view: CacheView) -> AttentionError:
    return AttentionError(
        f"layer {view.layer}: a token's score is NaN before position {view.seen}; the model's "
        f"keys or values are not finite, or the policy's score() is undefined for some token"
    )
