"""What a token is worth."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from torch import Tensor

from kvpolicy.ops.pool import pool
from kvpolicy.ops.sums import mean_over
from kvpolicy.parts.key_lengths import KeyLengths, key_lengths
from kvpolicy.parts.named import register_part
from kvpolicy.policy.view import CacheView

__all__ = ["Kernel", "Window", "head_mean", "mass", "pooled_mass", "recency", "short_keys"]


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("must be odd, for there to be a middle")
    return kernel


Kernel = Annotated[
    int, Field(ge=1, description="neighbours pooled over, odd"), AfterValidator(_odd)
]
Window = Annotated[int, Field(ge=0, description="newest tokens, which are no one's neighbours")]
Pooling = Annotated[Literal["mean", "max"], Field(description="of the neighbours")]


@register_part("score", "mass")
def mass(view: CacheView) -> Tensor:
    """The mass observed, ``[B, H, S]``."""
    return view.mass


@register_part("score", "head_mean", mixes_heads=True)
def head_mean(view: CacheView) -> Tensor:
    """The mean over heads of the mass observed, the same for every head, ``[B, H, S]``.

    All heads decide alike, so a slot holds the same position in every head, and heads can be
    averaged slot by slot.
    """
    return mean_over(view.mass, 1).unsqueeze(1).expand_as(view.mass)


@register_part("score", "pooled")
def pooled_mass(
    view: CacheView, kernel: Kernel = 5, window: Window = 8, how: Pooling = "mean"
) -> Tensor:
    """The mass of a token and its neighbours, among the cached tokens behind the window.

    Neighbours are those in the order of positions; tokens of the window count as zero, and so does
    what is beyond either end.

    Returns:
        ``[B, H, S]``.
    """
    newest = view.seen - window
    return pool(view.mass, view.positions, newest=newest, kernel=kernel, how=how)


@register_part("score", "recency")
def recency(view: CacheView) -> Tensor:
    """The position: the more recent, the better, ``[B, H, S]``."""
    return view.positions


@register_part("score", "short_keys", observes=KeyLengths)
def short_keys(view: CacheView) -> Tensor:
    """Minus a key's length: ``-|k_j|``, ``[B, H, S]``.

    Rotation keeps a key's length, so cached keys will do.
    """
    return -key_lengths(view)
