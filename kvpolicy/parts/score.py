"""What a token is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from torch import Tensor

from kvpolicy.observers import AttentionObserver
from kvpolicy.ops.key_lengths import lengths
from kvpolicy.ops.pool import pool
from kvpolicy.ops.sums import mean_over
from kvpolicy.parts.key_lengths import KeyLengths
from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Score
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape

__all__ = ["HeadMean", "Kernel", "Mass", "PooledMass", "Recency", "ShortKeys"]

Pooling = Literal["mean", "max"]


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("must be odd, for there to be a middle")
    return kernel


#: How many neighbours are pooled over.
Kernel = Annotated[int, Field(ge=1), AfterValidator(_odd)]


@register_part("mass")
class Mass(Score):
    """The mass observed."""

    needs_mass: ClassVar[bool] = True

    def worth(self, view: CacheView) -> Tensor:
        """As it is."""
        return view.mass


@register_part("head_mean")
class HeadMean(Score):
    """The mean over the heads of the mass observed.

    All heads decide alike, so a slot holds the same position in every head, and heads can be
    averaged slot by slot.
    """

    needs_mass: ClassVar[bool] = True
    mixes_heads: ClassVar[bool] = True

    def worth(self, view: CacheView) -> Tensor:
        """The same for every head."""
        return mean_over(view.mass, 1).unsqueeze(1).expand_as(view.mass)


@register_part("pooled")
class PooledMass(Score):
    """The mass of a token and its neighbours, among the cached tokens behind the window."""

    needs_mass: ClassVar[bool] = True

    kernel: Kernel = Field(5, description="neighbours pooled over, odd")
    window: int = Field(8, ge=0, description="newest tokens, which are no one's neighbours")
    how: Pooling = Field("mean", description="mean or max of the neighbours")

    def worth(self, view: CacheView) -> Tensor:
        """Pooled in the order of positions."""
        newest = view.seen - self.window
        return pool(view.mass, view.positions, newest=newest, kernel=self.kernel, how=self.how)


@register_part("recency")
class Recency(Score):
    """The more recent, the better."""

    def worth(self, view: CacheView) -> Tensor:
        """The position."""
        return view.positions

    def rank(self, view: CacheView) -> Tensor:
        """The position."""
        return view.positions


@register_part("short_keys")
class ShortKeys(Score):
    """The shorter the key, the better. Rotation keeps a key's length, so cached keys will do."""

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """Lengths, found once for each key."""
        return (KeyLengths(shape),)

    def worth(self, view: CacheView) -> Tensor:
        """Minus the length."""
        known = view.find_observer(KeyLengths)
        return -(lengths(view.keys) if known is None else known.of(view))
