"""R-KV: what the last queries looked at, less what other keys say as well."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kvpolicy.observers import WindowMass
from kvpolicy.ops.pool import pool
from kvpolicy.ops.redundancy import redundancy
from kvpolicy.parts import every, recent_tokens, register_part
from kvpolicy.parts.score import Kernel, Window
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["RKV", "not_redundant"]

Importance = Annotated[float, Field(ge=0, le=1, description="weight of mass against redundancy")]
Similar = Annotated[float, Field(ge=-1, le=1, description="cosine above which keys are alike")]


@register_part("score", "not_redundant")
def not_redundant(
    view: CacheView,
    kernel: Kernel = 7,
    window: Window = 8,
    importance: Importance = 0.1,
    similar: Similar = 0.5,
) -> Tensor:
    """Pooled mass, less how much a key resembles the others, ``[B, H, S]``.

    Both sum to 1 over the cached tokens, before pooling and weighting.
    """
    newest = view.seen - window
    mass = pool(view.mass, view.positions, newest=newest, kernel=kernel, how="max", share=True)
    return importance * mass - (1 - importance) * resemblance(view, similar)


def resemblance(view: CacheView, similar: float) -> Tensor:
    """Softmax over evictable tokens of each key's mean cosine with the others, ``[B, H, S]``.

    Each token spares the newest of those that are like it: of many alike, the newest stays. The
    prefix stays whatever it is like, and the padding in it must not count.
    """
    out = view.empty | view.pinned if view.may_be_empty else view.pinned
    return redundancy(view.keys, view.positions, out, similar=similar)


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
    interval: int = Field(8, ge=1, description="tokens between decisions, at least the window")
    kernel: Kernel = Field(7, description="neighbours whose highest mass counts, odd")
    importance: Importance = 0.1
    similar: Similar = 0.5

    def observers(self, shape: SlotShape) -> tuple[WindowMass, ...]:
        """Mass from the window's queries."""
        return (WindowMass(shape, self.window),)

    def protect(self, view: CacheView) -> Tensor:
        """The newest ``window`` tokens stay."""
        return recent_tokens(view, self.window)

    def score(self, view: CacheView) -> Tensor:
        """That mass, pooled, less redundancy."""
        return not_redundant(view, self.kernel, self.window, self.importance, self.similar)

    def headroom(self, view: CacheView) -> int:
        """Every few tokens."""
        return every(view, self.interval)
