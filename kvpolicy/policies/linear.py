"""LineAR: a few raster lines of cache, guided by the attention of the last finished line."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kvpolicy.layout import TokenLayout
from kvpolicy.observer import AttentionObserver, LineMass
from kvpolicy.policy import CacheView, ScoredPolicy
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
    recent lines 0.1223 and 0.0135.
    """

    anchors: int = Field(28, ge=0, description="first image tokens that are never evicted")
    recent_lines: int = Field(
        1, ge=0, description="finished lines that are kept whole, beside the current one"
    )

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """Mass from the last finished line."""
        return (LineMass(shape),)

    def min_budget(self, layout: TokenLayout) -> int:
        """The anchors, the recent lines and the current line."""
        return self.anchors + (self.recent_lines + 1) * layout.line_length

    def headroom(self, view: CacheView) -> int:
        """A whole line where one begins."""
        return view.layout.line_length if view.layout.is_line_start(view.seen) else 1

    def protect(self, view: CacheView) -> Tensor:
        """Anchors, and the lines near the current one."""
        return (view.index < self.anchors) | (view.lines >= view.line - self.recent_lines)

    def score(self, view: CacheView) -> Tensor:
        """Mass from the last finished line."""
        return view.observed(LineMass)
