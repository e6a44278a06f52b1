"""H2O: heavy hitters and a recent window."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvpolicy.observers import CumulativeMass
from kvpolicy.parts import recent_share
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["H2O"]


@register("h2o", paper="arXiv:2306.14048")
class H2O(ScoredPolicy):
    """Keep a recent window and the heavy hitters.

    ``score(j) = sum over every query q so far of A[q, j]`` (Zhang et al., "H2O: Heavy-Hitter
    Oracle for Efficient Generative Inference of Large Language Models", arXiv:2306.14048,
    algorithm 1). The window counts the token about to come.
    """

    recent: float = Field(
        0.5, ge=0, le=1, description="share of the budget that is a recent window"
    )

    def observers(self, shape: SlotShape) -> tuple[CumulativeMass, ...]:
        """Mass from every query so far."""
        return (CumulativeMass(shape),)

    def protect(self, view: CacheView) -> Tensor:
        """A recent window."""
        return recent_share(view, self.recent)

    def score(self, view: CacheView) -> Tensor:
        """The attention mass that each token has received so far."""
        return view.mass
