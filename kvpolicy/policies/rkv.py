"""R-KV: what the last queries looked at, less what other keys say as well."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.composition import Parts, Score
from kvpolicy.parts import Every, RecentTokens, WatchWindow, register_part
from kvpolicy.parts.score import Kernel, pool
from kvpolicy.policy import ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.view import CacheView

__all__ = ["RKV", "NotRedundant"]

#: Keys that are compared with all others at once: bounds the memory of a decision.
ROWS = 64


@register_part("not_redundant")
class NotRedundant(Score):
    """Pooled mass, less how much a key resembles the others."""

    needs_mass: ClassVar[bool] = True

    kernel: Kernel = Field(7, description="neighbours whose highest mass counts, odd")
    window: int = Field(8, ge=0, description="newest tokens, which are no one's neighbours")
    importance: float = Field(0.1, ge=0, le=1, description="weight of mass against redundancy")
    similar: float = Field(0.5, ge=-1, le=1, description="cosine above which keys are alike")

    def worth(self, view: CacheView) -> Tensor:
        """Both sum to 1 over the cached tokens, before pooling and weighting."""
        mass = view.mass.masked_fill((view.age <= self.window) | view.empty, 0.0)
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        mass = pool(view, mass, self.kernel, self.window, "max")
        return self.importance * mass - (1 - self.importance) * self.redundancy(view)

    def redundancy(self, view: CacheView) -> Tensor:
        """Softmax over evictable tokens of each key's mean cosine with the others, ``[B, H, S]``.

        Each token spares the newest of those that are like it: of many alike, the newest stays.
        """
        # The prefix stays whatever it is like, and the padding in it must not count.
        out = view.empty | view.pinned
        norms = torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32).clamp(min=1e-8)
        total = torch.zeros_like(norms)
        for first in range(0, view.handed_out, ROWS):
            rows = slice(first, first + ROWS)
            cosine = (view.keys[:, :, rows] @ view.keys.transpose(2, 3)).to(torch.float32)
            cosine /= norms[:, :, rows, None] * norms.unsqueeze(2)
            cosine.diagonal(first, dim1=2, dim2=3).zero_()
            cosine.masked_fill_(out[:, :, rows, None] | out.unsqueeze(2), 0.0)
            alike = view.positions.unsqueeze(2).masked_fill(cosine <= self.similar, -1)
            newest, place = alike.max(-1, keepdim=True)
            cosine.scatter_(3, place, cosine.gather(3, place).masked_fill(newest >= 0, 0.0))
            total += cosine.sum(2)
        mean = total / (~out).sum(-1, keepdim=True).clamp(min=1)
        return mean.masked_fill(out, torch.finfo(torch.float32).min).softmax(-1)


@register("rkv", paper="arXiv:2505.24133")
class RKV(ScoredPolicy):
    """Keep a window, and what its queries looked at unless other keys resemble it.

    ``score(j) = importance * I(j) - (1 - importance) * R(j)``: I is the window's mass on j as a
    share of its mass on all tokens behind the window, and the largest among j's neighbours; R is a
    softmax of the mean cosine of key j with the other keys, where each token leaves out the newest
    of those that are like it (Cai et al., "R-KV: Redundancy-aware KV Cache Compression for
    Reasoning Models", arXiv:2505.24133, section 3).

    The paper decides whenever a buffer of 128 tokens beside the budget is full; here the buffer,
    ``interval``, is part of the budget. Where query heads share a KV head their masses are averaged
    like everywhere here; the authors' code takes the largest of their logits.
    """

    window: int = Field(8, ge=1, description="last queries that vote, and are protected")
    interval: int = Field(8, ge=1, description="tokens between decisions")
    kernel: Kernel = Field(7, description="neighbours whose highest mass counts, odd")
    importance: float = Field(0.1, ge=0, le=1, description="weight of mass against redundancy")
    similar: float = Field(0.5, ge=-1, le=1, description="cosine above which keys are alike")

    @cached_property
    def parts(self) -> Parts:
        """A window; its queries' mass, less redundancy; every few tokens."""
        return Parts(
            protect=(RecentTokens(count=self.window),),
            observe=WatchWindow(queries=self.window),
            score=NotRedundant(
                kernel=self.kernel,
                window=self.window,
                importance=self.importance,
                similar=self.similar,
            ),
            decide=Every(tokens=self.interval),
        )
