"""Aside: what slots held before staged tokens were written into them, and putting it back."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.slots import SlotStore

__all__ = ["Aside"]


class Aside:
    """What slots held before staged tokens were written into them, W a head.

    What a victim's slot holds stays the same from the decision that names it until its turn. So it
    is copied ahead, for as many tokens at once as there is room for, and where tokens stay, those
    behind them find it copied.

    Args:
        store: the slots.
        room: W, places that there are; where W is large, as many as were needed so far.
    """

    def __init__(self, store: SlotStore, room: int) -> None:
        size = (*store.positions.shape[:2], room)
        with torch.inference_mode(False):  # as slots are: they may outlive this call's mode
            self.keys = store.keys.new_empty(*size, store.keys.shape[3])
            self.values = store.values.new_empty(*size, store.values.shape[3])
            self.positions = store.positions.new_empty(size)
            #: Of each slot, the first token taken back that was written into it.
            self.first = torch.empty_like(store.positions, dtype=torch.int64)
            self.turns = torch.arange(room, device=store.keys.device)
        self.store, self.room = store, room
        self.clear()

    def clear(self) -> None:
        """Nothing is kept any more, nor copied ahead."""
        # Where the tokens were written, the place of the first, and the place up to which is copied
        # what slots hold or held.
        self._slots: list[Tensor] = []
        self._base = self._copied = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all that was allocated."""
        tensors = (self.keys, self.values, self.positions, self.first, self.turns)
        return sum(tensor.nbytes for tensor in tensors)

    def fits(self, store: SlotStore, count: int) -> bool:
        """Whether it serves ``count`` tokens in these slots."""
        return (
            self.store is store and self.room >= count and self.first.shape == store.positions.shape
        )

    def move_from(self, other: Aside, count: int) -> None:
        """Take over what was kept aside for the first ``count`` tokens; it may be one's own."""
        self._slots, base, self._base, self._copied = other._slots, other._base, 0, count
        for name in ("keys", "values", "positions") if count else ():
            held = getattr(other, name)[:, :, base : base + count]
            getattr(self, name)[:, :, :count] = held.clone() if other is self else held

    def keep(self, store: SlotStore, slots: Tensor, at: int, reclaims: bool) -> None:
        """Keep what slots ``[B, H, T]`` hold, which tokens ``at`` and following are handed.

        Args:
            store: the slots.
            slots: those that :meth:`SlotStore.take` has just given.
            at: tokens kept before.
            reclaims: whether any of these slots has held a token before.
        """
        count = slots.shape[2]
        if self._base + at + count > self.room:
            self.move_from(self, at)
        self._slots.append(slots)
        if not reclaims:  # what was never handed out is empty, and is emptied again
            return
        begin, victims = self._base + at, store.victims
        if begin + count > self._copied:
            if victims is not None and store.reclaimed >= count:  # no fresh ones among them
                left = min(victims.shape[2] - store.reclaimed, self.room - begin - count)
                slots = victims.narrow(2, store.reclaimed - count, count + left)
            self._copy(store, slots, begin)
            self._copied = begin + slots.shape[2]

    def _copy(self, store: SlotStore, slots: Tensor, begin: int) -> None:
        count = slots.shape[2]
        torch.gather(store.positions, 2, slots, out=self.positions.narrow(2, begin, count))
        where = slots.unsqueeze(-1).expand(*slots.shape, store.keys.shape[3])
        torch.gather(store.keys, 2, where, out=self.keys.narrow(2, begin, count))
        if store.values.shape[3] != where.shape[3]:
            where = slots.unsqueeze(-1).expand(*slots.shape, store.values.shape[3])
        torch.gather(store.values, 2, where, out=self.values.narrow(2, begin, count))

    def decided(self, kept: int) -> None:
        """Other victims have been named: what was copied ahead of ``kept`` tokens is not theirs."""
        self._copied = min(self._copied, self._base + kept)

    def stay(self, count: int) -> None:
        """The first ``count`` tokens stay, and they are all that were kept."""
        self._slots = []
        self._base += count

    def put_back(self, store: SlotStore, begin: int, end: int, kept: int) -> None:
        """Put back what slots held before the tokens from ``begin`` on.

        Args:
            store: the slots.
            begin: the first token that goes.
            end: behind the last one whose position is put back: what decisions behind it changed is
                known from copies.
            kept: behind the last one that was written.
        """
        if begin == kept:
            return
        slots = torch.cat(self._slots, dim=2)[:, :, begin:kept]
        # Of two tokens that were written into a slot, the first has kept what is wanted.
        turns = self.turns[begin:kept].expand_as(slots)
        self.first.fill_(kept).scatter_reduce_(2, slots, turns, "amin")
        source = self.first.gather(2, slots) + self._base
        where = (store.batch_index, store.head_index, slots)
        for tensor, aside in ((store.keys, self.keys), (store.values, self.values)):
            into = source.unsqueeze(-1).expand(*slots.shape, aside.shape[3])
            tensor.index_put_(where, aside.gather(2, into))
        slots, source = slots[:, :, : end - begin], source[:, :, : end - begin]
        store.positions.scatter_(2, slots, self.positions.gather(2, source))
