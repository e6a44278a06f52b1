"""H2O: heavy hitters and a recent window."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field

from kvpolicy.parts import Mass, RecentShare, WatchAll
from kvpolicy.policy.parts import Parts
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.registry import register

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

    @cached_property
    def parts(self) -> Parts:
        """A share of the budget; cumulative mass; every token."""
        return Parts(
            protect=(RecentShare(share=self.recent),),
            observe=WatchAll(),
            score=Mass(),
        )
