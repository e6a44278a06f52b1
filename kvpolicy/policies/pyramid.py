"""PyramidKV: more cache below, less above, chosen by the last queries' pooled mass."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvpolicy.budget.budget import Arithmetic
from kvpolicy.observers import WindowMass
from kvpolicy.parts import every, pooled_mass, recent_tokens
from kvpolicy.parts.score import Kernel
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["Pyramid"]


@register("pyramid", paper="arXiv:2406.02069")
class Pyramid(ScoredPolicy):
    """Give lower layers more budget, and keep what the last queries looked at, and its neighbours.

    ``score(j) = mean over j's neighbours i of the sum over the last window queries q of A[q, i]``,
    with budgets that fall linearly with the layer (Cai et al., "PyramidKV: Dynamic KV Cache
    Compression based on Pyramidal Information Funneling", arXiv:2406.02069, sections 3.2 and 3.3):
    ``snapkv`` with another schedule.
    """

    window: int = Field(8, ge=1, description="last queries that vote, and are protected")
    interval: int = Field(8, ge=1, description="tokens between decisions, at least the window")
    kernel: Kernel = Field(5, description="neighbours pooled over, odd")
    beta: float = Field(20.0, ge=1, le=1e6, description="steepness: the top layer gets 1/beta")

    def schedule(self) -> Arithmetic:
        """Less in higher layers."""
        return Arithmetic(beta=self.beta)

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
