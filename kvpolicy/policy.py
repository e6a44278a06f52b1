"""EvictionPolicy: which tokens go when a new one needs room.

A policy *is* its frozen pydantic parameters and a few short methods. It holds no state of a
generation (that lives in the observers which it makes for each layer), never sees a model, and
never moves a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from kvpolicy.budget import Schedule, Uniform
from kvpolicy.errors import ParameterError, parameter_error
from kvpolicy.layout import TokenLayout
from kvpolicy.observer import AttentionObserver
from kvpolicy.slots import SlotShape, SlotStore

__all__ = ["CacheView", "EvictionPolicy", "ScoredPolicy"]

Observer = TypeVar("Observer", bound=AttentionObserver)


class CacheView:
    """What a policy may read when it decides: one layer, just before a token is written.

    Tensors have one entry for each slot that has ever held a token (S of them here); slots that
    are still untouched are free without a decision, and a policy does not see them.

    Attributes:
        seen: tokens of the sequence so far, which is the position of the token about to come.
        room: slots that can be handed out without a decision.
        layer: index of the layer, lowest first.
        num_layers: number of layers.
        budget: evictable tokens that a head of this layer may hold.
        layout: where tokens sit.
        may_be_empty: whether slots can be empty: victims that are hidden before their slot is
            reused (``reclaim="eager"``), padding, tokens behind a sliding window. Else all hold a
            token.
    """

    def __init__(
        self,
        store: SlotStore,
        observers: Sequence[AttentionObserver],
        *,
        seen: int,
        room: int,
        layer: int,
        num_layers: int,
        budget: int,
        layout: TokenLayout,
        may_be_empty: bool = True,
        start: Tensor | None = None,
    ) -> None:
        self._store = store
        self._observers = observers
        self.seen = seen
        self.room = room
        self.layer = layer
        self.num_layers = num_layers
        self.budget = budget
        self.layout = layout
        self.may_be_empty = may_be_empty
        self._start = None if start is None else start.view(-1, 1, 1)

    @property
    def positions(self) -> Tensor:
        """Positions of the cached tokens, ``[B, H, S]``, int32, -1 = empty."""
        return self._store.positions[:, :, : self.handed_out]

    @property
    def handed_out(self) -> int:
        """Slots of each head that have ever held a token: S."""
        return self._store.handed_out

    @property
    def keys(self) -> Tensor:
        """Cached keys, rotation included, ``[B, H, S, D]``."""
        return self._store.keys[:, :, : self.handed_out]

    @property
    def values(self) -> Tensor:
        """Cached values, ``[B, H, S, Dv]``."""
        return self._store.values[:, :, : self.handed_out]

    @cached_property
    def empty(self) -> Tensor:
        """Slots that hold nothing, bool ``[B, H, S]``."""
        return self.positions < 0

    @cached_property
    def pinned(self) -> Tensor:
        """Slots that hold the prefix, bool ``[B, H, S]``."""
        return self.layout.is_pinned(self._from_start)

    @cached_property
    def lines(self) -> Tensor:
        """Line of each cached token, ``[B, H, S]``; the prefix has negative lines."""
        return self.layout.line(self.positions)

    @property
    def line(self) -> int:
        """Line of the token about to come."""
        return self.layout.line(self.seen)

    @cached_property
    def age(self) -> Tensor:
        """Tokens since each cached one, ``[B, H, S]``: 1 for the newest, 0 for the one to come."""
        return self.seen - self.positions

    @cached_property
    def index(self) -> Tensor:
        """Place behind the prefix, ``[B, H, S]``: 0 for the first evictable token."""
        return self._from_start - self.layout.prefix

    @cached_property
    def _from_start(self) -> Tensor:
        """Positions counted from each sequence's first real token; padding comes before it."""
        return self.positions if self._start is None else self.positions - self._start

    def observer(self, kind: type[Observer]) -> Observer:
        """The observer of this kind that the policy made for this layer.

        Raises:
            ParameterError: the policy made none of this kind.
        """
        for observer in self._observers:
            if isinstance(observer, kind):
                return observer
        made = [type(observer).__name__ for observer in self._observers]
        raise ParameterError(
            f"the policy asks for {kind.__name__}, but its observers() made {made or 'none'}"
        )

    def observed(self, kind: type[AttentionObserver]) -> Tensor:
        """The reading of that observer, ``[B, H, S]``, float32."""
        return self.observer(kind).mass[:, :, : self.handed_out]


class EvictionPolicy(BaseModel, ABC):
    """A strategy: decides which slots are reclaimed, one layer and one decision at a time.

    Subclass :class:`ScoredPolicy` unless the decision is not a ranking. Fields are the policy's
    parameters.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Registry name; set by :func:`kvpolicy.register`.
    key: ClassVar[str] = ""
    #: Whether a head's decisions depend on other heads' attention (TOVA does).
    mixes_heads: ClassVar[bool] = False

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

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """Make the observers of one layer of one generation; none by default."""
        return ()

    def schedule(self) -> Schedule:
        """How layers share the budget; all the same by default."""
        return Uniform()

    def min_budget(self, layout: TokenLayout) -> int:
        """The smallest budget of a layer with which this policy works on this layout."""
        return 1

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
    """A policy that ranks tokens: override :meth:`score`, and :meth:`protect` where needed.

    Victims are the unprotected tokens with the lowest scores; among equal scores the older
    position goes first. Empty slots go before any token.
    """

    def protect(self, view: CacheView) -> Tensor | None:
        """Tokens that may not go besides the prefix, bool ``[B, H, S]``; None for no others."""
        return None

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """How much each token is worth, ``[B, H, S]``; higher = keep. NaN is not allowed."""

    def victims(self, view: CacheView, count: int) -> Tensor:
        """The ``count`` lowest scores among the unprotected, worst first."""
        score = self.score(view).to(torch.float32)
        protected = self.protect(view)
        if protected is not None:
            score = score.masked_fill(protected, torch.finfo(torch.float32).max)
        # The prefix stands above what a policy protects, should that be more than fits.
        score = score.masked_fill(view.pinned, torch.inf)
        if view.may_be_empty:
            score = score.masked_fill(view.empty, -torch.inf)
        if count == 1:
            return _lowest(score, view.positions)
        rank = _sortable(score, view.positions)
        return rank.topk(count, dim=-1, largest=False, sorted=True).indices


def _lowest(score: Tensor, position: Tensor) -> Tensor:
    """The slot with the lowest score, the oldest among equals: what ``_sortable`` ranks first."""
    least = score.amin(-1, keepdim=True)
    last = torch.iinfo(position.dtype).max
    return position.masked_fill(score > least, last).argmin(-1, keepdim=True)


def _sortable(score: Tensor, position: Tensor) -> Tensor:
    """One int64 a slot that orders by score, then by position.

    A single integer key makes the choice exact on every device, where sorts of floats may break
    ties as they like. IEEE floats order like sign-magnitude integers, so flipping the lower 31
    bits of the negative ones makes their bits order like the floats.
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which must tie with it
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(torch.int64) << 32) + position
