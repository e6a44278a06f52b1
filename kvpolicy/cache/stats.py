"""CacheStats: what a generation has cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CacheStats"]


@dataclass(frozen=True)
class CacheStats:
    """What a generation has cost so far.

    Attributes:
        policy: registry name of the policy.
        budgets: evictable tokens a head may hold, per layer.
        peak_tokens: most tokens that a head held at any instant, prefix included, per layer.
        bytes: bytes of all keys and values allocated.
        overhead_bytes: bytes of positions and observers beside them.
        evictions: tokens that a head lost, per layer.
        reports: attention reports that reached observers, per layer.
        seen: tokens of the sequence so far.
        left_alone: layers that need no policy, so that none of the above is theirs: their sliding
            window is no larger than their budget, or they keep no keys and values of their own.
        staging_bytes: bytes allocated to take staged tokens back; see :meth:`PolicyCache.stage`.
        passes: how often staged tokens were committed.
        staged: tokens that were staged before these commits.
        accepted: tokens that they kept.
    """

    policy: str
    budgets: tuple[int, ...]
    peak_tokens: tuple[int, ...]
    bytes: int
    overhead_bytes: int
    evictions: tuple[int, ...]
    reports: tuple[int, ...]
    seen: int
    left_alone: tuple[int, ...] = ()
    staging_bytes: int = 0
    passes: int = 0
    staged: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the staged tokens that were kept; NaN where none were staged."""
        return self.accepted / self.staged if self.staged else math.nan
