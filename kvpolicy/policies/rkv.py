"""R-KV: what the last queries looked at, less what other keys say as well."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from kvpolicy.ops.pool import pool
from kvpolicy.ops.redundancy import redundancy
from kvpolicy.parts import Every, RecentTokens, WatchWindow, register_part
from kvpolicy.parts.score import Kernel
from kvpolicy.policy.parts import Parts, Score
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.registry import register

__all__ = ["RKV", "NotRedundant"]


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
        mass = pool(
            view.mass,
            view.positions,
            newest=view.seen - self.window,
            kernel=self.kernel,
            how="max",
            share=True,
        )
        return self.importance * mass - (1 - self.importance) * self.redundancy(view)

    def redundancy(self, view: CacheView) -> Tensor:
        """Softmax over evictable tokens of each key's mean cosine with the others, ``[B, H, S]``.

        Each token spares the newest of those that are like it: of many alike, the newest stays. The
        prefix stays whatever it is like, and the padding in it must not count.
        """
        out = view.empty | view.pinned if view.may_be_empty else view.pinned
        return redundancy(view.keys, view.positions, out, similar=self.similar)


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
