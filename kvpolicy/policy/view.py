"""CacheView: what a policy may read when it decides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from kvpolicy.budget.span import first_tokens, tokens_of
from kvpolicy.errors import ParameterError
from kvpolicy.layout import TokenLayout
from kvpolicy.observers import AttentionObserver, Need, PlacedObserver
from kvpolicy.ops.outside import outside
from kvpolicy.slots import SlotStore

__all__ = ["CacheView"]

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
        first_head: index of head 0 here among all KV heads of the layer: not 0 where processes
            share a layer's heads (tensor parallelism).
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
        first_head: int = 0,
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
        self.first_head = first_head
        self._start = None if start is None else start.view(-1, 1, 1)

    @cached_property
    def positions(self) -> Tensor:
        """Positions of the cached tokens, ``[B, H, S]``, int32, -1 = empty."""
        return self._shown(self._store.positions)

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

    def first(self, span: int | str) -> Tensor:
        """The first tokens behind the prefix, and the prefix: ``index < span``, in one pass.

        Args:
            span: a number of tokens, or lines as long as the layout's first: ``"1 line"``.
        """
        end = first_tokens(span, self.layout) + self.layout.prefix
        return outside(self.positions, first=end) if self._start is None else self._from_start < end

    def since(self, position: int) -> Tensor:
        """The tokens from a position on, bool ``[B, H, S]``."""
        return outside(self.positions, last=position)

    def tokens(self, span: int | str) -> int:
        """How many tokens a span is here: ``28``, or lines of the layout: ``"1 line"``."""
        return tokens_of(span, self.layout)

    @cached_property
    def _from_start(self) -> Tensor:
        """Positions counted from each sequence's first real token; padding comes before it."""
        return self.positions if self._start is None else self.positions - self._start

    def observer(self, kind: type[Observer]) -> Observer:
        """The observer of this kind that the policy made for this layer.

        Raises:
            ParameterError: the policy made none of this kind.
        """
        observer = self.find_observer(kind)
        if observer is not None:
            return observer
        made = [type(observer).__name__ for observer in self._observers]
        raise ParameterError(
            f"the policy asks for {kind.__name__}, but its observers() made {made or 'none'}"
        )

    def find_observer(self, kind: type[Observer]) -> Observer | None:
        """The observer of this kind, where the policy made one for this layer."""
        return next((each for each in self._observers if isinstance(each, kind)), None)

    def observed(self, kind: type[AttentionObserver]) -> Tensor:
        """The reading of that observer, ``[B, H, S]``, float32."""
        return self._reading(self.observer(kind))

    @property
    def mass(self) -> Tensor:
        """What the policy's first observer of attention has read, ``[B, H, S]``, float32.

        Raises:
            ParameterError: the policy observes no attention.
        """
        for observer in self._observers:
            if observer.needs is not Need.NONE:
                return self._reading(observer)
        raise ParameterError("the policy asks for mass, but its observers() watch no attention")

    def _reading(self, observer: AttentionObserver) -> Tensor:
        """What an observer has read, ``[B, H, S]``."""
        if isinstance(observer, PlacedObserver):
            return observer.mass_at(self.layout, self.positions, self.seen)
        return self._shown(observer.mass)

    def _shown(self, by_slot: Tensor) -> Tensor:
        """Of the slots that have ever held a token."""
        held = self.handed_out
        return by_slot if held == by_slot.shape[2] else by_slot[:, :, :held]
