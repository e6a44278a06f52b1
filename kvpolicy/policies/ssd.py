"""SSD: heads that look at what is near, and heads that look at a few tokens wherever they are."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.ops.locality import is_local
from kvpolicy.parts import RecentShare, WatchAll, register_part
from kvpolicy.policy.parts import Parts, Score
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.registry import register

__all__ = ["SSD", "ByHead"]


@register_part("by_head")
class ByHead(Score):
    """Recency in heads whose mass lies on the newest tokens, mass in the others."""

    needs_mass: ClassVar[bool] = True

    window: int = Field(28, ge=1, description="newest tokens")
    local: float = Field(0.5, ge=0, le=1, description="share of the mass that makes a head local")

    def worth(self, view: CacheView) -> Tensor:
        """The position, or the mass."""
        return torch.where(self.is_local(view), view.positions, view.mass)

    def is_local(self, view: CacheView) -> Tensor:
        """Which heads are, bool ``[B, H, 1]``, by each token's mass from a query on average.

        The prefix does not count, since every head keeps it.
        """
        return is_local(
            view.mass,
            view.positions,
            seen=view.seen,
            window=self.window,
            share=self.local,
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
    window is as long as that.
    """

    recent: float = Field(
        0.5, ge=0, le=1, description="share of the budget that is a recent window in every head"
    )
    window: int = Field(28, ge=1, description="newest tokens that a local head looks at")
    local: float = Field(0.5, ge=0, le=1, description="share of the mass that makes a head local")

    @cached_property
    def parts(self) -> Parts:
        """A share of the budget; cumulative mass, or recency, by head; every token."""
        return Parts(
            protect=(RecentShare(share=self.recent),),
            observe=WatchAll(),
            score=ByHead(window=self.window, local=self.local),
        )
