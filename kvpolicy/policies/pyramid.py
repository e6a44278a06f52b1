"""PyramidKV: more cache below, less above, chosen by the last queries' pooled mass."""

from __future__ import annotations

from pydantic import Field

from kvpolicy.budget.budget import Arithmetic
from kvpolicy.policies.snapkv import SnapKV
from kvpolicy.registry import register

__all__ = ["Pyramid"]


@register("pyramid", paper="arXiv:2406.02069")
class Pyramid(SnapKV):
    """Give lower layers more budget, and keep what the last queries looked at, and its neighbours.

    ``score(j) = mean over j's neighbours i of the sum over the last window queries q of A[q, i]``,
    with budgets that fall linearly with the layer (Cai et al., "PyramidKV: Dynamic KV Cache
    Compression based on Pyramidal Information Funneling", arXiv:2406.02069, sections 3.2 and 3.3):
    ``snapkv`` with another schedule.
    """

    beta: float = Field(20.0, ge=1, le=1e6, description="steepness: the top layer gets 1/beta")

    def schedule(self) -> Arithmetic:
        """Less in higher layers."""
        return Arithmetic(beta=self.beta)
