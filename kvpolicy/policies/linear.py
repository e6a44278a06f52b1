"""LineAR: a few raster lines of cache, guided by the attention of the last finished line."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import Span
from kvpolicy.observers import LineMass
from kvpolicy.parts import anchors, each_line, recent_lines
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["Linear"]


@register("linear", paper="arXiv:2512.04857")
class Linear(ScoredPolicy):
    """Keep anchors, the current line, the last lines, and what the last finished line looked at.

    ``score(j) = sum over queries q of the last finished line of A[q, j]``, decided once a line, for
    one line ("Autoregressive Image Generation Needs Only a Few Lines of Cached Tokens",
    arXiv:2512.04857).

    The defaults are the best found on fashion-ar (28 x 28, budget 1/6, 256 test images), where they
    cost 0.0125 bits per pixel: 0, 14 and 56 anchors cost 0.0239, 0.0154 and 0.0148, and 0 and 2
    recent lines 0.1223 and 0.0135. On another grid they are as many lines, not as many tokens.
    """

    anchors: Span = Field(
        "1 line", description="first image tokens that are never evicted, or lines of them"
    )
    recent_lines: int = Field(
        1, ge=0, description="finished lines that are kept whole, beside the current one"
    )

    def observers(self, shape: SlotShape) -> tuple[LineMass, ...]:
        """Mass from the last finished line."""
        return (LineMass(shape),)

    def protect(self, view: CacheView) -> Tensor:
        """Anchors and lines."""
        return anchors(view, self.anchors) | recent_lines(view, self.recent_lines)

    def score(self, view: CacheView) -> Tensor:
        """What that line looked at."""
        return view.mass

    def headroom(self, view: CacheView) -> int:
        """Once a line, for a line."""
        return each_line(view)
