"""near: what lies nearest on the grid to what is still to come."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import PositiveSpan, Span
from kvpolicy.layout import TokenLayout
from kvpolicy.parts import anchors, register_part
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register

__all__ = ["Horizon", "Near", "coming", "nearness", "squared_distances"]

#: Distances that are worked out at once.
_PAIRS = 1 << 13

Horizon = Annotated[
    PositiveSpan,
    Field(description="next tokens whose surroundings count, or lines of them"),
]


@register_part("score", "nearness")
def nearness(view: CacheView, horizon: Horizon = "4 lines") -> Tensor:
    """``sum over the next tokens t of 1 / d(j, t)^2``, d in rows and columns, ``[B, H, S]``."""
    near = _nearness(view.layout, view.seen, view.tokens(horizon))
    places = view.positions.clamp(min=0).long()
    return near.to(places.device).gather(0, places.flatten()).view(places.shape)


@register("near")
class Near(ScoredPolicy):
    """Keep the tokens that lie nearest to what is still to come (and anchors, if any are wanted).

    ``score(j) = sum over the next tokens t of 1 / d(j, t)^2``, where d is the distance in rows and
    columns of the image (:class:`kvpolicy.OrderedLayout`; without one, tokens come line by line).
    Nothing is observed: the score follows from the order alone.
    """

    anchors: Span = Field(
        0, description="first image tokens that are never evicted, or lines of them"
    )
    horizon: Horizon = "4 lines"

    def protect(self, view: CacheView) -> Tensor:
        """The first tokens of the image stay, if any are to."""
        return anchors(view, self.anchors)

    def score(self, view: CacheView) -> Tensor:
        """How near each token is to the next ones."""
        return nearness(view, self.horizon)


def coming(layout: TokenLayout, seen: int, horizon: int) -> tuple[int, int]:
    """Positions of the next tokens, from the first to behind the last: at most ``horizon``."""
    end = seen + horizon
    return seen, end if layout.length is None else min(end, layout.length)


def squared_distances(layout: TokenLayout, seen: int, first: int, end: int) -> Tensor:
    """``d(j, t)^2`` of positions j before ``seen`` and t from ``first`` to ``end``, ``[seen, T]``.

    In rows and columns, float32, on the CPU.
    """
    position = torch.arange(end)
    row, column = layout.line(position).float(), layout.column(position).float()
    down = row[:seen, None] - row[first:]
    across = column[:seen, None] - column[first:]
    return down * down + across * across


def _nearness(layout: TokenLayout, seen: int, horizon: int) -> Tensor:
    """``sum over t of 1 / d(j, t)^2`` of each position j before ``seen``, float32 ``[seen]``."""
    first, end = coming(layout, seen, horizon)
    nearness = torch.zeros(seen)
    # Some of the next tokens at a time: no step allocates anything of the cache's size.
    some = max(1, _PAIRS // max(1, seen))
    for begin in range(first, end, some):
        squares = squared_distances(layout, seen, begin, min(begin + some, end))
        nearness += (1 / squares).sum(1)
    return nearness
