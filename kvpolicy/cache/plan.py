"""LayerPlan: what is fixed about one layer before its first token comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpolicy.layout import TokenLayout
from kvpolicy.policy.policy import EvictionPolicy

__all__ = ["Bind", "LayerPlan"]

#: Given a layer, its tokens so far, how many are about to come, its layout so far (None if it has
#: none) and its budget: the layout and the budget from now on; None while the layout is unknown.
Bind = Callable[[int, int, int, TokenLayout | None, int], tuple[TokenLayout, int] | None]


@dataclass(frozen=True)
class LayerPlan:
    """What never changes in a generation.

    Attributes:
        policy: who decides.
        layer: index of the layer, lowest first.
        num_layers: number of layers.
        eager: whether victims are hidden as soon as they are chosen.
        alike: whether the second half of a batch gives up what the first half does.
        window: newest tokens that a query sees, itself included (a sliding window, which the
            caller's masks impose); None for all. Tokens behind it are the first to go.
        lends: whether other layers attend to this layer's tokens, too.
        first_head: index of head 0 here among all KV heads of the layer: not 0 where processes
            share a layer's heads (tensor parallelism).
        bind: asked before each call where the layout is known late; None where it is known.
    """

    policy: EvictionPolicy
    layer: int
    num_layers: int
    eager: bool = False
    alike: bool = False
    window: int | None = None
    lends: bool = False
    first_head: int = 0
    bind: Bind | None = None
