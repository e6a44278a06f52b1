"""TOVA: what the newest token does not look at goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from kvpolicy.observer import AttentionObserver, LastQuery
from kvpolicy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["TOVA"]


@register("tova", paper="arXiv:2401.06104")
class TOVA(ScoredPolicy):
    """Keep what the newest query looks at, the same tokens for all heads of a layer.

    ``score(j) = mean over heads of A[q, j]`` for the newest query q (Oren et al., "Transformers are
    Multi-State RNNs", arXiv:2401.06104, section 4). All heads decide alike, so a slot holds the
    same position in every head, and heads can be averaged slot by slot.
    """

    mixes_heads: ClassVar[bool] = True

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """Mass from the newest query."""
        return (LastQuery(shape),)

    def score(self, view: CacheView) -> Tensor:
        """Its mean over the heads."""
        mass = view.observed(LastQuery)
        return mass.mean(1, keepdim=True).expand_as(mass)
