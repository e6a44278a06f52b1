"""TOVA: what the newest token does not look at goes."""

from __future__ import annotations

from functools import cached_property

from kvpolicy.parts import HeadMean, WatchNewest
from kvpolicy.policy.parts import Parts
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.registry import register

__all__ = ["TOVA"]


@register("tova", paper="arXiv:2401.06104")
class TOVA(ScoredPolicy):
    """Keep what the newest query looks at, the same tokens for all heads of a layer.

    ``score(j) = mean over heads of A[q, j]`` for the newest query q (Oren et al., "Transformers are
    Multi-State RNNs", arXiv:2401.06104, section 4).
    """

    @cached_property
    def parts(self) -> Parts:
        """The last query's mass, averaged over heads; every token."""
        return Parts(observe=WatchNewest(), score=HeadMean())
