"""Aside: what slots held before staged tokens were written into them, and putting it back."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.slots import SlotStore

__all__ = ["Aside"]


class Aside:
    """What slots held before staged tokens were written into them, W a head.

    Where W is large it is allocated as it is needed, and then kept.
    """

    def __init__(self, store: SlotStore, room: int) -> None:
        size = (*store.positions.shape[:2], room)
        with torch.inference_mode(False):  # as slots are: they may outlive this call's mode
            self.keys = store.keys.new_empty(*size, store.keys.shape[3])
            self.values = store.values.new_empty(*size, store.values.shape[3])
            self.positions = store.positions.new_empty(size)
            self.slots = torch.zeros(size, dtype=torch.int64, device=store.keys.device)
            #: Of each slot, the first token taken back that was written into it.
            self.first = torch.empty_like(store.positions, dtype=torch.int64)
            self.turns = torch.arange(room, device=store.keys.device)
        self.store = store

    @property
    def nbytes(self) -> int:
        """Bytes of all that was allocated."""
        tensors = (self.keys, self.values, self.positions, self.slots, self.first, self.turns)
        return sum(tensor.nbytes for tensor in tensors)

    def fits(self, store: SlotStore, count: int) -> bool:
        """Whether it serves ``count`` tokens in these slots."""
        return (
            self.store is store
            and self.turns.shape[0] >= count
            and self.first.shape == store.positions.shape
        )

    def copy_from(self, other: Aside, count: int) -> None:
        """Take over what was kept aside for the first ``count`` tokens."""
        for name in ("keys", "values", "positions", "slots"):
            getattr(self, name)[:, :, :count] = getattr(other, name)[:, :, :count]

    def keep(self, store: SlotStore, slots: Tensor, at: int, reclaims: bool) -> None:
        """Copy what slots ``[B, H, T]`` hold to the places from ``at`` on."""
        count = slots.shape[2]
        self.slots.narrow(2, at, count).copy_(slots)
        if not reclaims:  # what was never handed out is empty, and is emptied again
            return
        torch.gather(store.positions, 2, slots, out=self.positions.narrow(2, at, count))
        each = slots.unsqueeze(-1)
        for held, aside in ((store.keys, self.keys), (store.values, self.values)):
            where = each.expand(-1, -1, -1, held.shape[3])
            torch.gather(held, 2, where, out=aside.narrow(2, at, count))

    def put_back(self, store: SlotStore, begin: int, end: int, kept: int) -> None:
        """Put back what slots held before the tokens from ``begin`` on.

        Args:
            store: the slots.
            begin: the first token that goes.
            end: behind the last one before the next decision: positions are known from then.
            kept: behind the last one that was written.
        """
        slots = self.slots[:, :, begin:kept]
        # Of two tokens that were written into a slot, the first has kept what is wanted.
        turns = self.turns[begin:kept].expand_as(slots)
        self.first.fill_(kept).scatter_reduce_(2, slots, turns, "amin")
        source = self.first.gather(2, slots).unsqueeze(-1)
        where = (store.batch_index, store.head_index, slots)
        for tensor, aside in ((store.keys, self.keys), (store.values, self.values)):
            tensor.index_put_(where, aside.gather(2, source.expand(*slots.shape, aside.shape[3])))
        store.positions.scatter_(2, self.slots[:, :, begin:end], self.positions[:, :, begin:end])
