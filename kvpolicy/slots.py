"""SlotStore: a layer's cached keys and values in a fixed number of slots, reclaimed in place.

Keys already carry their rotation and attention doesn't care about the order of keys, so evicting
is handing the victim's slot to the next token: one scatter a step, no gather, no compaction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import CacheStateError, ShapeError
from kvpolicy.layout import TokenLayout
from kvpolicy.ops import triton
from kvpolicy.ops.cpu import native

__all__ = ["SlotBooks", "SlotShape", "SlotStore"]


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


class SlotBooks(NamedTuple):
    """All that a store knows besides its tensors of slots; see :class:`SlotStore`."""

    fresh: int
    victims: Tensor | None
    reclaimed: int
    may_be_empty: bool
    start: Tensor | None
    peak: int


class SlotStore:
    """Keys ``[B, H, S, D]``, values ``[B, H, S, Dv]`` and positions ``[B, H, S]`` of one layer.

    All tensors are allocated once. ``positions`` (int32, -1 = empty) is the single truth of what
    is cached. The store owns room: which slots are fresh (never handed out), which victims have
    been named and not yet reclaimed, and who gets the next slot. Slots are handed out uniformly:
    every head of every sequence has handed out the same number of slots at any time, though which
    token lies where differs from head to head.

    Args:
        shape: batch, heads and slots.
        key: a key tensor ``[B, H, *, D]`` whose head dim, dtype and device the store takes.
        value: a value tensor ``[B, H, *, Dv]``, likewise.
        hides: whether victims are emptied as soon as they are named, not when they are reclaimed.

    Attributes:
        fresh: slots of each head that have never been handed out.
        victims: slots named and not yet all reclaimed, int64 ``[B, H, N]``; None for none.
        reclaimed: how many of those have been handed out again.
        may_be_empty: whether a slot that has held a token can be empty: hidden victims, padding,
            tokens behind a sliding window.
        start: position of each sequence's first real token, int32 ``[B]``, where padding was found
            before it; None for 0.
        kernel: writes a token and attends to it in one pass, in C++ or on a GPU, where there is one
            that serves these tensors; None where there is not.
        peak: most tokens that a head has held at any instant.
    """

    def __init__(
        self, shape: SlotShape, key: Tensor, value: Tensor, *, hides: bool = False
    ) -> None:
        self.shape = shape
        size = (shape.batch, shape.heads, shape.slots)
        # Zeros, not uninitialised memory: masked slots are multiplied by probability zero, and
        # zero times NaN is NaN. No inference tensors, wherever the first token comes from: later
        # ones may come from outside of inference_mode, and could not be written into those.
        with torch.inference_mode(False):
            self.keys = torch.zeros(*size, key.shape[-1], dtype=key.dtype, device=key.device)
            self.values = torch.zeros(
                *size, value.shape[-1], dtype=value.dtype, device=value.device
            )
            self.positions = torch.full(size, -1, dtype=torch.int32, device=key.device)
        self._begin(fresh=shape.slots, hides=hides)

    def _begin(self, *, fresh: int, hides: bool) -> None:
        """The books of a store whose first ``slots - fresh`` slots hold tokens."""
        self.fresh = fresh
        self.victims: Tensor | None = None
        self.reclaimed = 0
        self.hides = self.may_be_empty = hides
        self.start: Tensor | None = None
        self.peak = self.shape.slots - fresh
        served = native.serves(self.keys, self.values) and self.keys.is_contiguous()
        self.kernel = (
            native.decoder(self.keys.dtype) if served else triton.writer(self.keys, self.values)
        )
        self._accepted: tuple[Any, ...] = ()
        self._index_heads()

    def _index_heads(self) -> None:
        """Every slot ``[S]``; ``[B, 1, 1]`` and ``[1, H, 1]``, which stand beside ``[B, H, T]``."""
        device = self.positions.device
        with torch.inference_mode(False):
            self.slot_index = torch.arange(self.shape.slots, device=device)
            self.batch_index = torch.arange(self.shape.batch, device=device).view(-1, 1, 1)
            self.head_index = torch.arange(self.shape.heads, device=device).view(1, -1, 1)

    @classmethod
    def holding(cls, shape: SlotShape, key: Tensor, value: Tensor) -> SlotStore:
        """A store that *is* the given ``[B, H, S, D]`` tokens 0 to S - 1; nothing is copied."""
        store = cls.__new__(cls)
        store.shape = shape
        store.keys, store.values = key, value
        positions = torch.arange(shape.slots, device=key.device, dtype=torch.int32)
        store.positions = positions.repeat(shape.batch, shape.heads, 1)
        store._begin(fresh=0, hides=False)
        return store

    # -- room ----------------------------------------------------------------------------------

    @property
    def handed_out(self) -> int:
        """Slots of each head that have ever held a token."""
        return self.shape.slots - self.fresh

    @property
    def room(self) -> int:
        """Slots that can be handed out without a decision: fresh ones, and victims."""
        return self.fresh + (0 if self.victims is None else self.victims.shape[2] - self.reclaimed)

    @property
    def held(self) -> int:
        """Tokens that each head holds now."""
        return self.shape.slots - (self.room if self.hides else self.fresh)

    @property
    def books(self) -> SlotBooks:
        """What the store knows now; no tensor in it is ever written in place."""
        return SlotBooks(
            *(self.fresh, self.victims, self.reclaimed, self.may_be_empty, self.start, self.peak)
        )

    @books.setter
    def books(self, books: SlotBooks) -> None:
        for name, value in zip(books._fields, books, strict=True):
            setattr(self, name, value)

    def name_victims(self, victims: Tensor) -> None:
        """Take the slots ``[B, H, N]`` as those that are reclaimed next, in their order.

        Victims of an earlier decision that were not reclaimed stay cached unless named again.
        """
        self.victims, self.reclaimed = victims, 0
        if self.hides:
            self.clear(victims)

    def take(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Hand out slots for ``count`` tokens, of which there must be room: fresh ones first.

        Returns:
            Slots, int64 ``[B, H, count]``; and those among them that held another token, if any.
        """
        fresh = min(count, self.fresh)
        if fresh == count:
            slots, reclaimed = self._take_fresh(count), None
        else:
            assert self.victims is not None  # a decision has seen to it
            reclaimed = self.victims
            if reclaimed.shape[2] != count - fresh:
                reclaimed = reclaimed.narrow(2, self.reclaimed, count - fresh)
            self.reclaimed += count - fresh
            slots = reclaimed
            if fresh:
                slots = torch.cat([self._take_fresh(fresh), reclaimed], dim=-1)
        held = self.shape.slots - self.fresh
        if self.hides and self.victims is not None:
            held += self.reclaimed - self.victims.shape[2]
        if held > self.peak:
            self.peak = held
        return slots, reclaimed

    def _take_fresh(self, count: int) -> Tensor:
        """Hand out untouched slots, ``[B, H, count]`` (expanded, not allocated)."""
        start = self.shape.slots - self.fresh
        self.fresh -= count
        slots = self.slot_index[start : start + count]
        return slots.expand(self.shape.batch, self.shape.heads, count)

    # -- tokens --------------------------------------------------------------------------------

    def cached(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of the slots that have ever held a token."""
        if self.fresh == 0:
            return self.keys, self.values, self.positions
        held = self.handed_out
        return self.keys[:, :, :held], self.values[:, :, :held], self.positions[:, :, :held]

    def write(self, slots: Tensor, key: Tensor, value: Tensor, first: int | Tensor) -> None:
        """Put consecutive tokens into slots, over whatever lay there.

        Args:
            slots: ``[B, H, T]``, distinct within a head.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, Dv]``.
            first: position of the first token; of one token it may be an int32 tensor ``[1]``.
        """
        # Not scatter_: in bfloat16 on a CPU it copies the whole store to float32 and back.
        where = (self.batch_index, self.head_index, slots)
        self.keys.index_put_(where, key)
        self.values.index_put_(where, value)
        if isinstance(first, Tensor):
            self.positions.scatter_(2, slots, first.view(1, 1, 1).expand_as(slots))
        elif slots.shape[2] == 1:
            self.positions.scatter_(2, slots, first)
        else:
            count = slots.shape[2]
            positions = torch.arange(first, first + count, device=slots.device, dtype=torch.int32)
            self.positions.scatter_(2, slots, positions.expand_as(slots))

    def clear(self, slots: Tensor) -> None:
        """Empty slots ``[B, H, N]``: nothing attends to them any more."""
        self.positions.scatter_(2, slots, -1)

    def peek(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the keys, values and positions in slots ``[B, H, T]``."""
        keys, values = (
            tensor.gather(2, slots.unsqueeze(-1).expand(*slots.shape, tensor.shape[3]))
            for tensor in (self.keys, self.values)
        )
        return keys, values, self.positions.gather(2, slots)

    def put_back(self, slots: Tensor, before: tuple[Tensor, Tensor, Tensor], dead: Tensor) -> None:
        """Undo what was written into slots ``[B, H, T]`` for dead tokens, bool ``[B, 1, T]``.

        Args:
            slots: where the tokens were written.
            before: what :meth:`peek` gave before that.
            dead: tokens that nobody will see: what they replaced stays, and an empty slot empty.
        """
        where, there = (self.batch_index, self.head_index, slots), dead.unsqueeze(-1)
        keys, values, positions = self.peek(slots)
        self.keys.index_put_(where, torch.where(there, before[0], keys))
        self.values.index_put_(where, torch.where(there, before[1], values))
        self.positions.scatter_(2, slots, torch.where(dead, before[2], positions))
        self.may_be_empty = True

    def empty_fresh(self, end: int) -> None:
        """Make fresh slots before slot ``end`` as if they had never been handed out."""
        for tensor, nothing in ((self.keys, 0), (self.values, 0), (self.positions, -1)):
            tensor[:, :, self.handed_out : end] = nothing

    def fill_from(self, other: SlotStore, kept: Tensor) -> None:
        """Take the tokens in the slots ``kept`` ``[B, H, S]`` of another store, in that order."""
        into = kept.unsqueeze(-1)
        self.keys.copy_(other.keys.gather(2, into.expand(*kept.shape, other.keys.shape[-1])))
        self.values.copy_(other.values.gather(2, into.expand(*kept.shape, other.values.shape[-1])))
        self.positions.copy_(other.positions.gather(2, kept))
        self.fresh = 0
        self.peak = max(self.peak, self.shape.slots)

    # -- checks, copies, size ------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def overhead_nbytes(self) -> int:
        """Bytes of the bookkeeping beside keys and values."""
        return self.positions.nbytes

    def accepts(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether a call is like the one that :meth:`check` has accepted last: most calls are."""
        if not type(query) is type(key) is type(value) is Tensor:
            return False
        return self._accepted == (
            *(query.shape, key.shape, value.shape),
            *(query.dtype, key.dtype, value.dtype),
            *(query.device, key.device, value.device),
        )

    def check(self, query: Tensor, key: Tensor, value: Tensor, seen: int) -> None:
        """Refuse tokens that don't fit this store, and remember those that do.

        Raises:
            CacheStateError: the batch has another size.
            ShapeError: heads, head dim, dtype or device differ from the store's.
        """
        if key.shape[0] != self.shape.batch:
            raise CacheStateError(
                f"batch changed from {self.shape.batch} to {key.shape[0]} after {seen} tokens; use "
                f"select_batch() to reorder a batch, reset() to start a new one"
            )
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
        self._accepted = (
            *(query.shape, key.shape, value.shape),
            *(query.dtype, key.dtype, value.dtype),
            *(query.device, key.device, value.device),
        )

    def select_batch(self, index: Tensor) -> None:
        """Keep the sequences ``index`` (beam search, batch selection); a sequence may repeat."""
        self.shape = replace(self.shape, batch=index.shape[0])
        with torch.inference_mode(False):
            for name in ("keys", "values", "positions", "victims", "start"):
                tensor = getattr(self, name)
                if tensor is not None:
                    setattr(self, name, tensor.index_select(0, index))
        self._accepted = ()
        self._index_heads()
