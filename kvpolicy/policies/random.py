"""The floor of every comparison: a random subset."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kvpolicy.ops.priorities import priorities
from kvpolicy.parts import register_part
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register

__all__ = ["Random", "lots"]

Seed = Annotated[int, Field(ge=0, lt=2**31, description="seed of the priorities")]


@register_part("score", "lots")
def lots(view: CacheView, seed: Seed = 0) -> Tensor:
    """A hash of seed, layer, head and position: the same on every device, and in any batch.

    Returns:
        ``[B, H, S]``, whole numbers in [0, 2**24).
    """
    return priorities(view.positions, (seed * 1009 + view.layer) * 1009 + view.first_head)


@register("random")
class Random(ScoredPolicy):
    """Keep a random subset of the tokens, each as likely as the others.

    Every (layer, head, position) draws a fixed priority from the seed and the highest are kept,
    which is a uniform sample without replacement at every moment.
    """

    seed: Seed = 0

    def score(self, view: CacheView) -> Tensor:
        """A priority for each token, drawn from ``seed``; see :func:`lots`."""
        return lots(view, self.seed)
