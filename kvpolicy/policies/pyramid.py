"""PyramidKV: more cache below, less above, chosen by the last queries' pooled mass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from kvpolicy.budget import Arithmetic, Schedule
from kvpolicy.layout import TokenLayout
from kvpolicy.observer import AttentionObserver, WindowMass
from kvpolicy.policies.windowed import check_window, pool
from kvpolicy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["Pyramid"]


@register("pyramid", paper="arXiv:2406.02069")
class Pyramid(ScoredPolicy):
    """Give lower layers more budget, and keep what the last queries looked at, and its neighbours.

    ``score(j) = mean over j's neighbours i of the sum over the last window queries q of A[q, i]``,
    with budgets that fall linearly with the layer (Cai et al., "PyramidKV: Dynamic KV Cache
    Compression based on Pyramidal Information Funneling", arXiv:2406.02069, sections 3.2 and 3.3).
    The paper compresses a prompt; while decoding, the same decision is made again every
    ``interval`` tokens, and neighbours are those among the tokens still cached.
    """

    beta: float = Field(20.0, ge=1, le=1e6, description="steepness: the top layer gets 1/beta")
    window: int = Field(8, ge=1, description="last queries that vote, and are protected")
    interval: int = Field(8, ge=1, description="tokens between decisions")
    kernel: int = Field(5, ge=1, description="neighbours pooled over, odd")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_window(self.window, self.interval, self.kernel)
        return self

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """Mass from the last queries before each decision."""
        return (WindowMass(shape, self.window),)

    def schedule(self) -> Schedule:
        """Arithmetic."""
        return Arithmetic(beta=self.beta)

    def min_budget(self, layout: TokenLayout) -> int:
        """The window, and the tokens that come before the next decision."""
        return self.window + self.interval

    def headroom(self, view: CacheView) -> int:
        """Room for the tokens until the next decision, once there is none left."""
        return self.interval if view.room == 0 else 1

    def protect(self, view: CacheView) -> Tensor:
        """The tokens of the window."""
        return view.age <= self.window

    def score(self, view: CacheView) -> Tensor:
        """Pooled mass from the window."""
        return pool(view.observed(WindowMass), view.positions, self.kernel)
