"""SnapKV: the last queries say what the next ones will need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from kvpolicy.layout import TokenLayout
from kvpolicy.observer import AttentionObserver, WindowMass
from kvpolicy.policies.windowed import check_window, pool
from kvpolicy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["SnapKV"]


@register("snapkv", paper="arXiv:2404.14469")
class SnapKV(ScoredPolicy):
    """Keep a window, and what its queries looked at, and its neighbours.

    ``score(j) = mean over j's neighbours i of the sum over the last window queries q of A[q, i]``
    (Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469,
    section 4). The paper compresses a prompt; while decoding, the same decision is made again every
    ``interval`` tokens, and neighbours are those among the tokens still cached.
    """

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
