"""The floor of every comparison: a random subset."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field
from torch import Tensor

from kvpolicy.ops.priorities import priorities
from kvpolicy.parts import register_part
from kvpolicy.policy.parts import Parts, Score
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.registry import register

__all__ = ["Lots", "Random"]


@register_part("lots")
class Lots(Score):
    """Lots drawn by hashing: the same on every device, and independent of the batch."""

    seed: int = Field(0, ge=0, lt=2**31, description="seed of the priorities")

    def worth(self, view: CacheView) -> Tensor:
        """A hash of seed, layer, head and position in [0, 2**24), exact in float32."""
        seed = (self.seed * 1009 + view.layer) * 1009 + view.first_head
        return priorities(view.positions, seed)


@register("random")
class Random(ScoredPolicy):
    """Keep a random subset of the tokens, each as likely as the others.

    Every (layer, head, position) draws a fixed priority from the seed and the highest are kept,
    which is a uniform sample without replacement at every moment.
    """

    seed: int = Field(0, ge=0, lt=2**31, description="seed of the priorities")

    @cached_property
    def parts(self) -> Parts:
        """Lots; every token."""
        return Parts(score=Lots(seed=self.seed))
