"""SSD: heads that look at what is near, and heads that look at a few tokens wherever they are."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import PositiveSpan
from kvpolicy.observers import CumulativeMass
from kvpolicy.ops.locality import is_local
from kvpolicy.parts import recent_share, register_part
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register
from kvpolicy.slots import SlotShape

__all__ = ["SSD", "by_head", "local_heads"]

Newest = Annotated[
    PositiveSpan, Field(description="newest tokens that a local head looks at, or lines of them")
]
Local = Annotated[float, Field(ge=0, le=1, description="share of the mass that makes a head local")]


@register_part("score", "by_head")
def by_head(view: CacheView, window: Newest = "1 line", local: Local = 0.5) -> Tensor:
    """Recency in heads whose mass lies on the newest tokens, mass in the others, ``[B, H, S]``."""
    return torch.where(local_heads(view, window, local), view.positions, view.mass)


def local_heads(view: CacheView, window: int | str, local: float) -> Tensor:
    """Which heads are local, bool ``[B, H, 1]``, by each token's mass from a query on average.

    The prefix does not count, since every head keeps it.
    """
    return is_local(
        view.mass,
        view.positions,
        seen=view.seen,
        window=view.tokens(window),
        share=local,
        pinned=view.pinned if view.may_be_empty else None,
        prefix=view.layout.prefix,
        may_be_empty=view.may_be_empty,
    )


@register("ssd", paper="arXiv:2510.18716")
class SSD(ScoredPolicy):
    """Let heads that look near keep what is recent, and the others their semantic sinks.

    ``score(j) = j`` in a spatial-locality head, and the mass of ``j`` in a semantic-sink head
    ("SSD: Spatial-Semantic Head Decoupling for Efficient Autoregressive Image Generation",
    arXiv:2510.18716). There is no public code, and these are choices made here: mass is that of all
    queries so far; a head is local while the newest ``window`` tokens get at least ``local`` of
    what a query gives tokens behind the prefix, so that a head may change its kind; every head
    keeps a recent window, as in ``h2o``; and all heads have the same budget, so a local head's
    window is as long as that. What is near is a line by default (28 tokens where that was tried); a
    line of text has as many tokens as its layout says, which is one unless you set it.
    """

    recent: float = Field(
        0.5, ge=0, le=1, description="share of the budget that is a recent window in every head"
    )
    window: Newest = "1 line"
    local: Local = 0.5

    def observers(self, shape: SlotShape) -> tuple[CumulativeMass, ...]:
        """Mass from every query so far."""
        return (CumulativeMass(shape),)

    def protect(self, view: CacheView) -> Tensor:
        """A recent window."""
        return recent_share(view, self.recent)

    def score(self, view: CacheView) -> Tensor:
        """Recency, or mass, by head."""
        return by_head(view, self.window, self.local)
