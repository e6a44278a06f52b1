"""Key norm: what few queries will look at has a long key."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register

__all__ = ["KNorm"]


@register("knorm", paper="arXiv:2406.11430")
class KNorm(ScoredPolicy):
    """Keep the tokens with the smallest keys.

    ``score(j) = -|k_j|`` (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV
    Cache Compression", arXiv:2406.11430, section 3). Nothing is observed. Rotation keeps a key's
    length, so the cached keys will do.
    """

    def score(self, view: CacheView) -> Tensor:
        """The shorter the key, the better."""
        norms: Tensor = torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32)
        return -norms
