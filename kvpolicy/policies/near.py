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

__all__ = ["Near", "nearness"]

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
    """Keep anchors, and the tokens that lie nearest to what is still to come.

    ``score(j) = sum over the next tokens t of 1 / d(j, t)^2``, where d is the distance in rows and
    columns of the image (:class:`kvpolicy.OrderedLayout`; without one, tokens come line by line).
    Nothing is observed: the score follows from the order alone.
    """

    anchors: Span = Field(
        "1 line", description="first image tokens that are never evicted, or lines of them"
    )
    horizon: Horizon = "4 lines"

    def protect(self, view: CacheView) -> Tensor:
        """The first tokens of the image stay."""
        return anchors(view, self.anchors)

    def score(self, view: CacheView) -> Tensor:
        """How near each token is to the next ones."""
        return nearness(view, self.horizon)


def _nearness(layout: TokenLayout, seen: int, horizon: int) -> Tensor:
    """``sum over t of 1 / d(j, t)^2`` of each position j before ``seen``, float32 ``[seen]``."""
    end = seen + horizon if layout.length is None else min(seen + horizon, layout.length)
    position = torch.arange(end)
    row, column = layout.line(position).float(), layout.column(position).float()
    nearness = torch.zeros(seen)
    # Some of the next tokens at a time: no step allocates anything of the cache's size.
    some = max(1, _PAIRS // max(1, seen))
    for first in range(seen, end, some):
        down = row[:seen, None] - row[first : first + some]
        across = column[:seen, None] - column[first : first + some]
        nearness += (1 / (down * down + across * across)).sum(1)
    return nearness
