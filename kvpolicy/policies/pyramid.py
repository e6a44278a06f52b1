"""PyramidKV: more cache below, less above, chosen by the last queries' pooled mass."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field

from kvpolicy.budget.budget import Arithmetic
from kvpolicy.parts import Every, PooledMass, RecentTokens, WatchWindow
from kvpolicy.parts.score import Kernel
from kvpolicy.policy.parts import Parts
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.registry import register

__all__ = ["Pyramid"]


@register("pyramid", paper="arXiv:2406.02069")
class Pyramid(ScoredPolicy):
    """Give lower layers more budget, and keep what the last queries looked at, and its neighbours.

    ``score(j) = mean over j's neighbours i of the sum over the last window queries q of A[q, i]``,
    with budgets that fall linearly with the layer (Cai et al., "PyramidKV: Dynamic KV Cache
    Compression based on Pyramidal Information Funneling", arXiv:2406.02069, sections 3.2 and 3.3):
    the parts of ``snapkv``, with another schedule.
    """

    beta: float = Field(20.0, ge=1, le=1e6, description="steepness: the top layer gets 1/beta")
    window: int = Field(8, ge=1, description="last queries that vote, and are protected")
    interval: int = Field(8, ge=1, description="tokens between decisions")
    kernel: Kernel = Field(5, description="neighbours pooled over, odd")

    @cached_property
    def parts(self) -> Parts:
        """A window; its queries' mass, pooled; every few tokens; less in higher layers."""
        return Parts(
            protect=(RecentTokens(count=self.window),),
            observe=WatchWindow(queries=self.window),
            score=PooledMass(kernel=self.kernel, window=self.window),
            decide=Every(tokens=self.interval),
            schedule=Arithmetic(beta=self.beta),
        )
