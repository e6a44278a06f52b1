"""SlotStore: a layer's cached keys and values in a fixed number of slots, reclaimed in place.

Keys already carry their rotation and attention doesn't care about the order of keys, so evicting
is handing the victim's slot to the next token: one scatter a step, no gather, no compaction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpolicy.errors import ShapeError
from kvpolicy.layout import TokenLayout

__all__ = ["SlotShape", "SlotStore"]


@dataclass(frozen=True)
class SlotShape:
    """The shape of a layer's store, as observers and policies see it.

    Attributes:
        batch: sequences B.
        heads: KV heads H.
        slots: slots S of each head, pinned prefix included.
        device: where the store lies.
        layout: where the tokens sit.
    """

    batch: int
    heads: int
    slots: int
    device: torch.device
    layout: TokenLayout


class SlotStore:
    """Keys ``[B, H, S, D]``, values ``[B, H, S, Dv]`` and positions ``[B, H, S]`` of one layer.

    All tensors are allocated once. ``positions`` (int32, -1 = empty) is the single truth of what
    is cached. Slots are handed out uniformly: every head of every sequence has handed out the
    same number of slots at any time (``fresh`` of them are still untouched), though which token
    lies where differs from head to head.

    Args:
        shape: batch, heads and slots.
        key: a key tensor ``[B, H, *, D]`` whose head dim, dtype and device the store takes.
        value: a value tensor ``[B, H, *, Dv]``, likewise.
    """

    def __init__(self, shape: SlotShape, key: Tensor, value: Tensor) -> None:
        self.shape = shape
        size = (shape.batch, shape.heads, shape.slots)
        # Zeros, not uninitialised memory: masked slots are multiplied by probability zero, and
        # zero times NaN is NaN.
        self.keys = torch.zeros(*size, key.shape[-1], dtype=key.dtype, device=key.device)
        self.values = torch.zeros(*size, value.shape[-1], dtype=value.dtype, device=value.device)
        self.positions = torch.full(size, -1, dtype=torch.int32, device=key.device)
        self.fresh = shape.slots
        self._index_heads()

    def _index_heads(self) -> None:
        """Indices ``[B, 1, 1]`` and ``[1, H, 1]`` that stand beside slots ``[B, H, T]``."""
        device = self.positions.device
        self._batch = torch.arange(self.shape.batch, device=device).view(-1, 1, 1)
        self._head = torch.arange(self.shape.heads, device=device).view(1, -1, 1)

    @classmethod
    def holding(cls, shape: SlotShape, key: Tensor, value: Tensor) -> SlotStore:
        """A store that *is* the given ``[B, H, S, D]`` tokens 0 to S - 1; nothing is copied."""
        store = cls.__new__(cls)
        store.shape = shape
        store.keys, store.values = key, value
        positions = torch.arange(shape.slots, device=key.device, dtype=torch.int32)
        store.positions = positions.expand(shape.batch, shape.heads, shape.slots)
        store.fresh = 0
        return store

    @property
    def handed_out(self) -> int:
        """Slots of each head that have ever held a token."""
        return self.shape.slots - self.fresh

    def cached(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of the slots that have ever held a token."""
        if self.fresh == 0:
            return self.keys, self.values, self.positions
        held = self.handed_out
        return self.keys[:, :, :held], self.values[:, :, :held], self.positions[:, :, :held]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def overhead_nbytes(self) -> int:
        """Bytes of the bookkeeping beside keys and values."""
        return self.positions.nbytes

    def check(self, key: Tensor, value: Tensor) -> None:
        """Refuse tokens that don't fit this store.

        Raises:
            ShapeError: batch, heads, head dim, dtype or device differ from the store's.
        """
        for name, new, held in (("key", key, self.keys), ("value", value, self.values)):
            got = (new.shape[0], new.shape[1], new.shape[3])
            want = (held.shape[0], held.shape[1], held.shape[3])
            if got != want:
                raise ShapeError(
                    f"{name} is {list(new.shape)}, but the cache holds "
                    f"[B={want[0]}, H={want[1]}, T, D={want[2]}]"
                )
            if new.dtype != held.dtype or new.device != held.device:
                raise ShapeError(
                    f"{name} is {new.dtype} on {new.device}, but the cache holds {held.dtype} on "
                    f"{held.device}"
                )

    def take_fresh(self, count: int) -> Tensor:
        """Hand out ``count`` untouched slots; ``[B, H, count]`` (expanded, not allocated)."""
        start = self.handed_out
        self.fresh -= count
        slots = torch.arange(start, start + count, device=self.positions.device)
        return slots.expand(self.shape.batch, self.shape.heads, count)

    def write(self, slots: Tensor, key: Tensor, value: Tensor, first: int) -> None:
        """Put consecutive tokens into slots, over whatever lay there.

        Args:
            slots: ``[B, H, T]``, distinct within a head.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, Dv]``.
            first: position of the first token.
        """
        self.put(slots, key, value)
        count = slots.shape[-1]
        if count == 1:
            self.positions.scatter_(2, slots, first)
        else:
            positions = torch.arange(first, first + count, device=slots.device, dtype=torch.int32)
            self.positions.scatter_(2, slots, positions.expand_as(slots))

    def put(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put keys and values into slots; whoever calls sees to the positions."""
        # Not scatter_: in bfloat16 on a CPU it copies the whole store to float32 and back.
        where = (self._batch, self._head, slots)
        self.keys.index_put_(where, key)
        self.values.index_put_(where, value)

    def clear(self, slots: Tensor) -> None:
        """Empty slots ``[B, H, N]``: nothing attends to them any more."""
        self.positions.scatter_(2, slots, -1)

    def fill_from(self, other: SlotStore, kept: Tensor) -> None:
        """Take the tokens in the slots ``kept`` ``[B, H, S]`` of another store, in that order."""
        into = kept.unsqueeze(-1)
        self.keys.copy_(other.keys.gather(2, into.expand(*kept.shape, other.keys.shape[-1])))
        self.values.copy_(other.values.gather(2, into.expand(*kept.shape, other.values.shape[-1])))
        self.positions.copy_(other.positions.gather(2, kept))
        self.fresh = 0

    def select_batch(self, index: Tensor) -> None:
        """Keep the sequences ``index`` (beam search, batch selection); a sequence may repeat."""
        self.shape = replace(self.shape, batch=index.shape[0])
        self.keys = self.keys.index_select(0, index)
        self.values = self.values.index_select(0, index)
        self.positions = self.positions.index_select(0, index)
        self._index_heads()
