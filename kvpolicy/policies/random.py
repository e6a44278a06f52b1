"""The floor of every comparison: a random subset."""

from __future__ import annotations

from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.ops.cpu import native
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
        positions, first = view.positions, view.first_head
        base = (self.seed * 1009 + view.layer) * 1009
        kernel = native.chooser("lots", positions)
        if kernel is not None:
            drawn: Tensor = kernel(positions, base + first)
            return drawn
        heads = torch.arange(first, first + positions.shape[1], device=positions.device)
        key = (base + heads.view(1, -1, 1)) * 1_000_003 + positions
        return (_mix(key) >> 40).to(torch.float32)


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


def _mix(key: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014): int64 to int64 in [0, 2**64 / 2)."""
    key = key * -7046029254386353131
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (key ^ ((key >> 31) & 0x1FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF
