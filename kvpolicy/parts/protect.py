"""What may not go."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from kvpolicy.layout import TokenLayout
from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Protect
from kvpolicy.policy.view import CacheView

__all__ = ["Anchors", "RecentLines", "RecentShare", "RecentTokens"]


@register_part("anchors")
class Anchors(Protect):
    """The first tokens behind the prefix: anchors of an image, sinks of a text."""

    count: int = Field(4, ge=0, description="first tokens behind the prefix")

    def mask(self, view: CacheView) -> Tensor:
        """By their place behind the prefix."""
        return view.before(self.count)

    def most(self, budget: int, layout: TokenLayout, column: int) -> int:
        """All of them."""
        return self.count


@register_part("lines")
class RecentLines(Protect):
    """The current line, and the last finished ones."""

    count: int = Field(1, ge=0, description="finished lines, beside the current one")

    def mask(self, view: CacheView) -> Tensor:
        """By their distance from the line of the token about to come."""
        return view.lines >= view.line - self.count

    def most(self, budget: int, layout: TokenLayout, column: int) -> int:
        """The finished lines, and the current one up to here."""
        return self.count * layout.line_length + column


@register_part("window")
class RecentTokens(Protect):
    """The newest tokens."""

    count: int = Field(8, ge=1, description="newest tokens")

    def mask(self, view: CacheView) -> Tensor:
        """From the first of them."""
        return view.positions >= view.seen - self.count

    def most(self, budget: int, layout: TokenLayout, column: int) -> int:
        """All of them."""
        return self.count


@register_part("share")
class RecentShare(Protect):
    """The newest tokens, as a share of the budget; the token about to come is one of them."""

    share: float = Field(0.5, ge=0, le=1, description="share of the budget")

    def mask(self, view: CacheView) -> Tensor:
        """From the first of them."""
        return view.positions > view.seen - math.ceil(self.share * view.budget)

    def most(self, budget: int, layout: TokenLayout, column: int) -> int:
        """The share, without the token about to come."""
        return max(math.ceil(self.share * budget) - 1, 0)
