"""Padding: tokens of a text that nobody will see hold no slot that a live one could have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.observers import AttentionObserver, like_state, state_of
from kvpolicy.slots import SlotStore

__all__ = ["Padding", "find_padding"]


def find_padding(visible: Tensor, first: int, count: int, store: SlotStore) -> Tensor:
    """Which new tokens the mask hides even from themselves, bool ``[B, T]``.

    Where they come first in a sequence, ``store.start`` moves behind them: pinned sinks and anchors
    of a text are counted from its first real token, so that a sequence keeps what it would keep
    alone.

    Args:
        visible: the mask by position, ``[B|1, 1|H, T, first + T]``.
        first: position of the first new token.
        count: new tokens T.
        store: their slots.
    """
    own = visible[:, 0, :, first : first + count].diagonal(dim1=1, dim2=2)
    dead = (~own).expand(store.shape.batch, count)
    if first == 0 or store.start is not None:
        leading = dead.to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
        if store.start is not None:
            leading = torch.where(store.start == first, store.start + leading, store.start)
        store.start = leading
    return dead


class Padding:
    """New tokens some of which are padding, before they are written.

    Args:
        dead: those that are, bool ``[B, T]``.
        store: where they go.
        slots: there, ``[B, H, T]``.
        observers: who will be told of them.
    """

    def __init__(
        self, dead: Tensor, store: SlotStore, slots: Tensor, observers: Sequence[AttentionObserver]
    ) -> None:
        self.dead, self.store, self.slots, self.observers = dead, store, slots, observers
        self._held = store.peek(slots)
        states = [state_of(observer) for observer in observers]
        self._readings = [state.gather(-1, like_state(slots, state)) for state in states]

    def empty(self) -> None:
        """Undo what padding has done: what it replaced stays, and an empty slot empty."""
        dead = self.dead.unsqueeze(1)
        self.store.put_back(self.slots, self._held, dead)
        for observer, reading in zip(self.observers, self._readings, strict=True):
            state = state_of(observer)
            slots = like_state(self.slots, state)
            gone = like_state(dead.expand_as(self.slots), state)
            state.scatter_(-1, slots, torch.where(gone, reading, state.gather(-1, slots)))
