"""LayerState: one layer of a generation between two calls, and what every call does with it.

Every call attends over slots, and tells the policy's observers what was attended to. How room is
made for new tokens is in ``making_room``, what the first call does besides in ``first_call``, and a
token's whole way in ``layer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.cache.checks import Accepted
from kvpolicy.cache.shared import NewestCall
from kvpolicy.cache.step import Step
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import AttentionError, CacheStateError, LayoutError
from kvpolicy.layout import UNBOUND, TokenLayout
from kvpolicy.observers import AttentionObserver, AttentionReport, Need
from kvpolicy.ops.attend import attend
from kvpolicy.ops.cpu import native
from kvpolicy.policy.policy import CacheView, EvictionPolicy
from kvpolicy.slots import SlotShape, SlotStore

__all__ = ["QUERY_CHUNK", "LayerState"]

#: Queries that attend, and are observed, at once: bounds the memory of a long call.
QUERY_CHUNK = 128

#: Given a layer, its tokens so far, how many are about to come, and its layout so far (None if it
#: has none): the layout from now on and the layer's budget; None while the layout is unknown.
Bind = Callable[[int, int, int, TokenLayout | None], tuple[TokenLayout, int] | None]


class DecisionRecorder(Protocol):
    """Told of each decision of a layer; see :mod:`kvpolicy.tracing.recording`."""

    def decided(self, layer: LayerState, view: CacheView, victims: Tensor, fresh: int) -> None: ...
    def compressed(self, layer: LayerState, view: CacheView, victims: Tensor) -> None: ...
    def select_batch(self, index: Tensor) -> None: ...
    def reset(self) -> None: ...


class LayerState:
    """What one layer holds, who watches it, and how it attends.

    Args:
        policy: the policy.
        layout: where tokens sit; ``UNBOUND`` until ``bind`` says so.
        layer: index of the layer, lowest first.
        num_layers: number of layers.
        budget: evictable tokens that a head may hold.
        eager: whether victims are hidden as soon as they are chosen.
        bind: asked before each call where the layout is known late.
        window: newest tokens that a query sees, itself included (a sliding window, which the
            caller's masks impose); None for all. Tokens behind it are the first to go.
        lent: whether other layers attend to this layer's tokens, too (see :class:`NewestCall`).
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        layout: TokenLayout,
        *,
        layer: int,
        num_layers: int,
        budget: int,
        eager: bool,
        bind: Bind | None = None,
        window: int | None = None,
        lent: bool = False,
    ) -> None:
        self.policy = policy
        self.layout = layout
        self.layer = layer
        self.num_layers = num_layers
        self.budget = budget
        self.eager = eager
        self.bind = bind
        self.window = window
        self.newest = NewestCall(layer, lent=lent)
        # Where processes share a layer's heads, the index of the first one here.
        self.first_head = 0
        # Told of each decision, where somebody wants a trace.
        self.recorder: DecisionRecorder | None = None
        self.reset()

    @property
    def capacity(self) -> int:
        """Slots of a head: pinned prefix + budget."""
        return self.layout.prefix + self.budget

    def reset(self) -> None:
        """Back to the state before the first token."""
        if self.recorder is not None:
            self.recorder.reset()
        if self.bind is not None:
            self.layout, self.budget = UNBOUND, 0
        self.accepted = Accepted()  # a new one, for it remembers the store
        self.store: SlotStore | None = None
        # The kernel that writes a token and attends to it in one pass, where it can be used.
        self.decoder: native.Decoder | None = None
        self.observers: Sequence[AttentionObserver] = ()
        self.need = Need.NONE
        self.seen = 0
        # Victims not reclaimed yet, [B, H, N], of which `reused` have been handed out.
        self.queue: Tensor | None = None
        self.reused = 0
        # The first position before which a decision may be due.
        self.settled = 0
        self.peak = self.reports = 0
        # The step that compiled code is about to make, or is making; None between steps.
        self.step: Step | None = None
        self._step: Step | None = None
        # Position of each sequence's first real token, [B]; None while nothing is padded.
        self.start: Tensor | None = None
        self.newest.forget()

    @property
    def evictions(self) -> int:
        """Tokens that each head has lost."""
        return 0 if self.store is None else self.seen - self.held()

    @property
    def room(self) -> int:
        """Slots that can be handed out without a decision."""
        queued = 0 if self.queue is None else self.queue.shape[-1] - self.reused
        return self.require_store().fresh + queued

    def held(self) -> int:
        """Tokens that each head holds now."""
        store = self.require_store()
        hidden = self.room - store.fresh if self.eager else 0
        return store.handed_out - hidden

    @property
    def name(self) -> str:
        """What the policy is called in an error."""
        return self.policy.key or type(self.policy).__name__

    def require_store(self) -> SlotStore:
        """The store, or an error where no token has come yet."""
        if self.store is None:
            raise CacheStateError(f"layer {self.layer} has not seen a token yet")
        return self.store

    def select_batch(self, index: Tensor) -> None:
        """Keep the sequences ``index``."""
        if self.store is None:
            return
        index = index.to(self.store.keys.device)
        self.store.select_batch(index)
        self._step = None  # its tensors have the batch that was
        if self.recorder is not None:
            self.recorder.select_batch(index)
        if self.start is not None:
            self.start = self.start.index_select(0, index)
        for observer in self.observers:
            observer.mass = observer.mass.index_select(0, index)
        if self.queue is not None:
            self.queue = self.queue.index_select(0, index)

    def view(self, store: SlotStore, seen: int, room: int) -> CacheView:
        """What the policy may read, just before the token ``seen`` is written."""
        return CacheView(
            store,
            self.observers,
            seen=seen,
            room=room,
            layer=self.layer,
            num_layers=self.num_layers,
            budget=self.budget,
            layout=self.layout,
            may_be_empty=self.eager or self.window is not None or self.start is not None,
            start=self.start,
            first_head=self.first_head,
        )

    def shape(self, key: Tensor, slots: int) -> SlotShape:
        """The shape of a store that takes such keys."""
        return SlotShape(
            batch=key.shape[0],
            heads=key.shape[1],
            slots=slots,
            device=key.device,
            layout=self.layout,
        )

    def allocate(self, key: Tensor, value: Tensor) -> SlotStore:
        """Allocate the slots, for such keys and values."""
        self.store = SlotStore(self.shape(key, self.capacity), key, value)
        if native.serves(self.store.keys, self.store.values):
            self.decoder = native.decoder()
        return self.store

    def watch(self, shape: SlotShape) -> None:
        """Make the observers of a store of this shape."""
        self.observers = tuple(self.policy.observers(shape))
        self.need = max((observer.needs for observer in self.observers), default=Need.NONE)

    def attend_over(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        terms: Terms,
        visible: Tensor | None,
        bias: Tensor | None,
        held: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over slots; ``visible`` and ``bias`` are by slot.

        Of the keys, the first lie in slots that hold the positions ``held``; the others, or all,
        are new tokens in order.
        """
        self.newest.keep(query, keys, values, visible, bias, held, self.seen)
        return attend(
            query,
            keys,
            values,
            visible=visible,
            bias=bias,
            need_mass=self.need is not Need.NONE,
            **terms.scoring(),
        )

    def observe(
        self, mass: Tensor | None, first: int, room: int, finite: bool | None = None
    ) -> None:
        """Hand the mass to the observers, after refusing NaN; ``finite`` where that is known."""
        if mass is None:
            return
        if mass.device.type == "cpu":
            if not (math.isfinite(mass.sum().item()) if finite is None else finite):
                raise AttentionError(
                    f"layer {self.layer}: attention from position {first} is NaN; the model's "
                    f"queries or keys are not finite"
                )
        else:
            torch._assert_async(mass.sum().isfinite())
        report = AttentionReport(mass=mass, first=first, room=room, layout=self.layout)
        for observer in self.observers:
            observer.observe(report)
        self.reports += 1

    def check_length(self, count: int) -> None:
        """Refuse more tokens than the layout has."""
        length = self.layout.length
        if length is not None and self.seen + count > length:
            raise LayoutError(
                f"position {self.seen + count - 1} is outside {self.layout!r}, which has {length} "
                f"tokens; reset() the cache for a new sequence, or give the layout its real size"
            )
