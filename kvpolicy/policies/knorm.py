"""Key norm: what few queries will look at has a long key."""

from __future__ import annotations

from functools import cached_property

from kvpolicy.parts import ShortKeys
from kvpolicy.policy.parts import Parts
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.registry import register

__all__ = ["KNorm"]


@register("knorm", paper="arXiv:2406.11430")
class KNorm(ScoredPolicy):
    """Keep the tokens with the smallest keys.

    ``score(j) = -|k_j|`` (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV
    Cache Compression", arXiv:2406.11430, section 3). Nothing is observed.
    """

    @cached_property
    def parts(self) -> Parts:
        """Short keys; every token."""
        return Parts(score=ShortKeys())
