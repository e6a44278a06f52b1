"""TOVA: what the newest token does not look at goes."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.observers import LastQuery
from kvpolicy.parts import head_mean
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["TOVA"]


@register("tova", paper="arXiv:2401.06104")
class TOVA(ScoredPolicy):
    """Keep what the newest query looks at, the same tokens for all heads of a layer.

    ``score(j) = mean over heads of A[q, j]`` for the newest query q (Oren et al., "Transformers are
    Multi-State RNNs", arXiv:2401.06104, section 4).
    """

    @property
    def mixes_heads(self) -> bool:
        """All heads decide alike."""
        return True

    def observers(self, shape: SlotShape) -> tuple[LastQuery, ...]:
        """Mass from the newest query."""
        return (LastQuery(shape),)

    def score(self, view: CacheView) -> Tensor:
        """That mass, averaged over heads."""
        return head_mean(view)
