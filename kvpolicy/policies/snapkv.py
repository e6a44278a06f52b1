"""SnapKV: the last queries say what the next ones will need."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvpolicy.observers import WindowMass
from kvpolicy.parts import every, pooled_mass, recent_tokens
from kvpolicy.parts.score import Kernel
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

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
    interval: int = Field(8, ge=1, description="tokens between decisions, at least the window")
    kernel: Kernel = Field(5, description="neighbours pooled over, odd")

    def observers(self, shape: SlotShape) -> tuple[WindowMass, ...]:
        """Mass from the window's queries."""
        return (WindowMass(shape, self.window),)

    def protect(self, view: CacheView) -> Tensor:
        """The newest ``window`` tokens stay."""
        return recent_tokens(view, self.window)

    def score(self, view: CacheView) -> Tensor:
        """That mass, pooled over neighbours."""
        return pooled_mass(view, self.kernel, self.window, "mean")

    def headroom(self, view: CacheView) -> int:
        """Every few tokens."""
        return every(view, self.interval)
