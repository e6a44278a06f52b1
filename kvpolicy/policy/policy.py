"""EvictionPolicy: which tokens go when a new one needs room.

A policy *is* its frozen pydantic parameters and a few short methods. It holds no state of a
generation (that lives in the observers which it makes for each layer), never sees a model, and
never moves a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from kvpolicy.budget.budget import Schedule, Uniform
from kvpolicy.errors import parameter_error
from kvpolicy.layout import RasterLayout, TokenLayout, largest_group
from kvpolicy.observers import AttentionObserver
from kvpolicy.policy.probe import (
    Unread,
    needs_raster_order,
    refuse_long_window,
    smallest_budget,
)
from kvpolicy.policy.ranking import lowest
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape

__all__ = ["CacheView", "EvictionPolicy", "ScoredPolicy"]

#: What is wrong with a policy on a large grid is wrong with it everywhere.
_ANY_GRID = RasterLayout(rows=64, cols=64)


class EvictionPolicy(BaseModel, ABC):
    """A strategy: decides which slots are reclaimed, one layer and one decision at a time.

    Subclass :class:`ScoredPolicy` unless the decision is not a ranking. Fields are the policy's
    parameters.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
    """

    # Strict: "3" and 3.0 are no integers. An integer will do for a float, and JSON for all.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    #: Registry name; set by :func:`kvpolicy.register`.
    key: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        # A subclass of a registered policy is another policy, and must not go by its name.
        if "key" not in cls.__dict__:
            cls.key = ""

    def __init__(self, /, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            name = f"policy {self.key or type(self).__name__!r}"
            raise parameter_error(name, type(self), error) from None

    @property
    def label(self) -> str:
        """What it goes by in a table: its name in the registry, or that of its class."""
        return self.key or type(self).__name__

    @property
    def mixes_heads(self) -> bool:
        """Whether a head's decisions depend on other heads' attention (TOVA's do)."""
        return False

    @property
    def raster_only(self) -> bool:
        """Whether it makes sense in raster order alone (LineAR decides line by line)."""
        return False

    @property
    def own_ranking(self) -> bool:
        """Whether kvpolicy's ranking names the victims, and so slots that there are.

        What is named by anything else is looked at, before it is trusted with memory.
        """
        return False

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """Make the observers of one layer of one generation; none by default."""
        return ()

    def schedule(self) -> Schedule:
        """How layers share the budget; all the same by default."""
        return Uniform()

    def check(self, num_layers: int) -> None:
        """Refuse a model that its parameters are not for, where a cache is made; by default none.

        Raises:
            ParameterError: they are for another number of layers.
        """

    def min_budget(self, layout: TokenLayout) -> int:
        """The smallest budget of a layer with which this policy works on this layout.

        By default, room for what comes at once: a token, or the largest group.
        """
        return largest_group(layout)

    def headroom(self, view: CacheView) -> int:
        """Slots that must be free before the token ``view.seen`` is written: 1, or a line.

        The cache asks ahead of time, so the answer may depend on ``seen``, ``room``, ``layer``,
        ``budget`` and ``layout``, not on tensors.
        """
        return 1

    @abstractmethod
    def victims(self, view: CacheView, count: int) -> Tensor:
        """Choose the slots to reclaim.

        Args:
            view: the layer, just before the token ``view.seen`` is written.
            count: how many slots are wanted.

        Returns:
            Slots, int64 ``[B, H, count]``, distinct within a head, worst first; they are
            reclaimed in that order.
        """


class ScoredPolicy(EvictionPolicy):
    """A policy that ranks tokens: override :meth:`score`, and what else differs from the default.

    Victims are the unprotected tokens with the lowest scores; among equal scores the older
    position goes first. Empty slots go before any token.

    Example:
        >>> from kvpolicy import ScoredPolicy
        >>> from kvpolicy.parts import anchors
        >>> class KeepTheNewest(ScoredPolicy):
        ...     '''Four anchors, and of the rest the newest.'''
        ...     def protect(self, view):
        ...         return anchors(view, 4)
        ...     def score(self, view):
        ...         return view.positions
        >>> KeepTheNewest().min_budget(RasterLayout(rows=8, cols=8))
        5
    """

    @model_validator(mode="after")
    def _fits(self) -> Self:
        with suppress(Unread):
            refuse_long_window(self, _ANY_GRID)
        return self

    @property
    def raster_only(self) -> bool:
        """Whether what it observes, protects or wants can't be said in any other order.

        A policy whose score alone needs raster order overrides this.
        """
        return needs_raster_order(self)

    @property
    def own_ranking(self) -> bool:
        """That :meth:`score` alone decides."""
        kind = type(self)
        return kind.victims is ScoredPolicy.victims and kind.choose is ScoredPolicy.choose

    def protect(self, view: CacheView) -> Tensor | None:
        """Tokens that may not go besides the prefix, bool ``[B, H, S]``; None for no others."""
        return None

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """How much each token is worth, ``[B, H, S]``; higher = keep. NaN is not allowed."""

    def min_budget(self, layout: TokenLayout) -> int:
        """What ``protect`` protects at most, and what ``headroom`` wants beside it.

        Both are asked on a view of this layout that has positions, but no keys and no mass. A
        policy that protects by what it reads there must override this method.

        Raises:
            ParameterError: ``protect`` or ``headroom`` reads what the view has not, or a window is
                observed that is longer than the time between two decisions.
            BudgetError: everything is protected.
        """
        return smallest_budget(self, layout)

    def victims(self, view: CacheView, count: int) -> Tensor:
        """The slots that go: :meth:`choose` among what is not protected."""
        return self.choose(view, count, self.protect(view))

    def choose(self, view: CacheView, count: int, protected: Tensor | None) -> Tensor:
        """The ``count`` lowest scores among the unprotected, worst first.

        Override it where a token's worth depends on what else goes, so that a set must be chosen.

        Args:
            view: the layer.
            count: how many slots are wanted.
            protected: what may not go besides the prefix, bool ``[B, H, S]``; None for nothing.

        Returns:
            Slots, int64 ``[B, H, count]``; see :meth:`EvictionPolicy.victims`.

        Raises:
            AttentionError: a score is NaN.
        """
        return lowest(view, count, self.score(view), protected)
