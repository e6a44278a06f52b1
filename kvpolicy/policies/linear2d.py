"""linear2d: what coming lines will read, with and without a token."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import Span
from kvpolicy.observers import LineMass
from kvpolicy.ops import change
from kvpolicy.parts import anchors, each_line, moved_mass, recent_lines, register_part
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

    A line whose queries gave the masses ``m`` read ``o = sum_j m_j v_j / sum_j m_j`` on average.
    Without the tokens E it would have read something else, and the change is
    ``sum_{j in E} m_j (o - v_j)`` but for a factor: many tokens of little mass that say the same
    are together worth a lot, and a token whose value is the average is worth nothing. What coming
    lines will look at is not known, but a head that looks two rows up will, one line later, look at
    the row below that one: line w from here is taken to look as the last one did, but w lines
    further down, ``m^w(j) = m(w lines above j)``. So of all sets E of the size that is wanted, one
    is sought for which

    ``sum over w = 0 ... lines of |sum_{j in E} m^w_j (o^w - v_j)|^2``

    is small, by adding the token that increases it least, again and again. The part
    ``least_change:lines:how`` ranks tokens by the change that each makes alone where ``how`` is
    ``alone``.
    """

    anchors: Span = Field(
        "1 line", description="first image tokens that are never evicted, or lines of them"
    )
    recent_lines: int = Field(
        1, ge=0, description="finished lines that are kept whole, beside the current one"
    )
    lines: Lines = 5

    def observers(self, shape: SlotShape) -> tuple[LineMass, ...]:
        """Mass from the last finished line."""
        return (LineMass(shape),)

    def protect(self, view: CacheView) -> Tensor:
        """Anchors and lines."""
        return anchors(view, self.anchors) | recent_lines(view, self.recent_lines)

    def score(self, view: CacheView) -> Tensor:
        """What changes if a token goes alone."""
        return change_alone(view, self.lines)

    def choose(self, view: CacheView, count: int, protected: Tensor | None) -> Tensor:
        """What changes least together."""
        return least_change(view, count, protected, self.lines)

    def headroom(self, view: CacheView) -> int:
        """Once a line, for a line."""
        return each_line(view)


def change_alone(view: CacheView, lines: Lines = 5, how: How = "together") -> Tensor:
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
    alone = change_alone(view, lines)
    if how == "alone":
        return lowest(view, count, alone, protected)
    cost = leveled(view, alone, protected)
    return change.together(view.values, moved_mass(view, lines), cost, view.positions, count)


register_part("score", "least_change", choose=least_change, raster_only=True)(change_alone)
