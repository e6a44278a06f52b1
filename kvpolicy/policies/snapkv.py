"""SnapKV: the last queries say what the next ones will need."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field

from kvpolicy.parts import Every, PooledMass, RecentTokens, WatchWindow
from kvpolicy.parts.score import Kernel
from kvpolicy.policy.parts import Parts
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.registry import register

__all__ = ["SnapKV"]


@register("snapkv", paper="arXiv:2404.14469")
class SnapKV(ScoredPolicy):
    """Keep a window, and what its queries looked at, and its neighbours.

    ``score(j) = mean over j's neighbours i of the sum over the last window queries q of A[q, i]``
    (Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469,
    section 4). The paper compresses a prompt; while decoding, the same decision is made again every
    ``interval`` tokens, and neighbours are those among the tokens still cached. Tokens of the
    window are no neighbours.
    """

    window: int = Field(8, ge=1, description="last queries that vote, and are protected")
    interval: int = Field(8, ge=1, description="tokens between decisions")
    kernel: Kernel = Field(5, description="neighbours pooled over, odd")

    @cached_property
    def parts(self) -> Parts:
        """A window; its queries' mass, pooled; every few tokens."""
        return Parts(
            protect=(RecentTokens(count=self.window),),
            observe=WatchWindow(queries=self.window),
            score=PooledMass(kernel=self.kernel, window=self.window),
            decide=Every(tokens=self.interval),
        )
