"""Evict what, taken together, changes least of what coming lines will read."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kvpolicy.ops import change
from kvpolicy.parts.moving import moved
from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Score
from kvpolicy.policy.view import CacheView

__all__ = ["LeastChange"]


@register_part("least_change")
class LeastChange(Score):
    """The change of what is read if a token goes, and with what goes besides.

    A line whose queries gave the masses ``m`` read ``o = sum_j m_j v_j / sum_j m_j`` on average.
    Without the tokens E it would have read something else, and the change is
    ``sum_{j in E} m_j (o - v_j)`` but for a factor: many tokens of little mass that say the same
    are together worth a lot, and a token whose value is the average is worth nothing. What coming
    lines will look at is not known; line w from here is taken to look as the last one did, but w
    lines further down: ``m^w(j) = m(w lines above j)``. So of all sets E of the size that is
    wanted, one is sought for which

    ``sum over w = 0 ... lines of |sum_{j in E} m^w_j (o^w - v_j)|^2``

    is small, by adding the token that increases it least, again and again.
    """

    needs_mass: ClassVar[bool] = True

    lines: int = Field(5, ge=0, le=1000, description="coming lines that are thought of")
    how: Literal["together", "alone"] = Field(
        "together", description="whether what else goes counts, or each token alone"
    )

    def worth(self, view: CacheView) -> Tensor:
        """The change if a token goes alone: ``sum over w of (m^w_j)^2 |o^w - v_j|^2``.

        Values of a head are in units of the largest number among them, once they are centred.
        """
        return change.alone(view.values, moved(view, self.lines))

    def choose(self, view: CacheView, score: Tensor, count: int) -> Tensor | None:
        """One token after the other, each the one that adds least to the change."""
        if self.how == "alone":
            return None
        mass = moved(view, self.lines)
        return change.together(view.values, mass, score, view.positions, count)
