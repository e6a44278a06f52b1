"""linear2d: what coming lines will read, with and without a token."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import PositiveSpan, Span
from kvpolicy.observers import RollingMass
from kvpolicy.ops import change
from kvpolicy.parts import anchors, each_part, moved_mass, recent_tokens, register_part
from kvpolicy.parts.decide import Parts
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.policy.ranking import leveled, lowest
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["Linear2D", "change_alone", "least_change"]

Lines = Annotated[int, Field(ge=0, le=1000, description="coming lines that are thought of")]
How = Annotated[
    Literal["together", "alone"],
    Field(description="whether what else goes counts, or each token alone"),
]


@register("linear2d")
class Linear2D(ScoredPolicy):
    """``linear``, but of the tokens that may go, those whose loss together changes least.

    A line's worth of queries that gave the masses ``m`` read ``o = sum_j m_j v_j / sum_j m_j`` on
    average. Without the tokens E they would have read something else, and the change is
    ``sum_{j in E} m_j (o - v_j)`` but for a factor: many tokens of little mass that say the same
    are together worth a lot, and a token whose value is the average is worth nothing. What coming
    queries will look at is not known, but a head that looks two rows up will, one line later, look
    at the row below that one: what comes w lines from here is taken to look as the last line's
    worth of queries did, but w lines further down, ``m^w(j) = m(w lines above j)``. So of all sets
    E of the size that is wanted, one is sought for which

    ``sum over w = 0 ... lines of |sum_{j in E} m^w_j (o^w - v_j)|^2``

    is small, by adding the token that increases it least, again and again. The part
    ``least_change:lines:how`` ranks tokens by the change that each makes alone where ``how`` is
    ``alone``.

    Where ``linear`` decides once a line and keeps the last line whole, this decides ``parts`` times
    a line, and keeps a line's worth of the newest tokens: what lies above and behind the token to
    come is needed less than what lies above and before it, and a budget of a few lines has no
    tokens to spare.
    """

    anchors: Span = Field(
        "1 line", description="first image tokens that are never evicted, or lines of them"
    )
    recent: PositiveSpan = Field(
        "1 line", description="newest tokens that are kept, or lines of them"
    )
    lines: Lines = 2
    parts: Parts = 6

    def observers(self, shape: SlotShape) -> tuple[RollingMass, ...]:
        """Mass from the last line's worth of queries."""
        return (RollingMass(shape),)

    def protect(self, view: CacheView) -> Tensor:
        """Anchors, and the newest tokens: those from the one above the next on."""
        return anchors(view, self.anchors) | recent_tokens(view, self.recent)

    def score(self, view: CacheView) -> Tensor:
        """What changes if a token goes alone."""
        return change_alone(view, self.lines)

    def choose(self, view: CacheView, count: int, protected: Tensor | None) -> Tensor:
        """What changes least together."""
        return least_change(view, count, protected, self.lines)

    def headroom(self, view: CacheView) -> int:
        """Once a part of a line, for that part."""
        return each_part(view, self.parts)


def change_alone(view: CacheView, lines: Lines = 2, how: How = "together") -> Tensor:
    """What changes if a token goes alone: ``sum over w of (m^w_j)^2 |o^w - v_j|^2``, ``[B, H, S]``.

    Values of a head are in units of the largest number among them, once they are centred.
    """
    return change.alone(view.values, moved_mass(view, lines))


def least_change(
    view: CacheView, count: int, protected: Tensor | None, lines: int, how: str = "together"
) -> Tensor:
    """One token after the other, each the one that adds least to the change of what is read.

    Returns:
        Slots, int64 ``[B, H, count]``, in the order in which they go.
    """
    mass = moved_mass(view, lines)
    alone = change.alone(view.values, mass)
    if how == "alone":
        return lowest(view, count, alone, protected)
    cost = leveled(view, alone, protected)
    return change.together(view.values, mass, cost, view.positions, count)


register_part("score", "least_change", choose=least_change, raster_only=True)(change_alone)
