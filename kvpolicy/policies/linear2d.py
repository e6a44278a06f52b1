"""linear2d: what coming lines will read, with and without a token."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field

from kvpolicy.parts import Anchors, EachLine, LeastChange, RecentLines, WatchLine
from kvpolicy.policy.parts import Parts
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.registry import register

__all__ = ["Linear2D"]


@register("linear2d")
class Linear2D(ScoredPolicy):
    """``linear``, but of the tokens that may go, those whose loss together changes least.

    What a line looks at moves with it: a head that looks two rows up will, one line later, look at
    the row below that one. So each of the coming lines is taken to look as the last one did, moved
    down with it; and what goes is chosen so that what these lines read, values weighted by mass,
    stays as it was (:class:`kvpolicy.parts.LeastChange`). Decided once a line, for one line.
    """

    anchors: int = Field(28, ge=0, description="first image tokens that are never evicted")
    recent_lines: int = Field(
        1, ge=0, description="finished lines that are kept whole, beside the current one"
    )
    lines: int = Field(5, ge=0, le=1000, description="coming lines that are thought of")

    @cached_property
    def parts(self) -> Parts:
        """Those of ``linear``, but for the score."""
        return Parts(
            protect=(Anchors(count=self.anchors), RecentLines(count=self.recent_lines)),
            observe=WatchLine(),
            score=LeastChange(lines=self.lines),
            decide=EachLine(),
        )
