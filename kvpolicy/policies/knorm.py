"""Key norm: what few queries will look at has a long key."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.parts import KeyLengths, key_lengths
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["KNorm"]


@register("knorm", paper="arXiv:2406.11430")
class KNorm(ScoredPolicy):
    """Keep the tokens with the smallest keys.

    ``score(j) = -|k_j|`` (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV
    Cache Compression", arXiv:2406.11430, section 3). No attention is observed.
    """

    def observers(self, shape: SlotShape) -> tuple[KeyLengths, ...]:
        """Lengths that are known, so that each key is read once."""
        return (KeyLengths(shape),)

    def score(self, view: CacheView) -> Tensor:
        """Rotation keeps a key's length, so cached keys will do."""
        return -key_lengths(view)
