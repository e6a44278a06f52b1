"""The length of each slot's key, found once: a key stays as it is for as long as it is cached."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy.observers import AttentionReport, Need
from kvpolicy.ops.key_lengths import UNKNOWN, find_unknown, lengths
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape

__all__ = ["KeyLengths", "key_lengths"]


class KeyLengths:
    """An observer of slots rather than of attention: which of them hold another key than before.

    Reading all keys takes as long as half of an attention step; between two decisions, all but a
    few of them are what they were.
    """

    needs: ClassVar[Need] = Need.NONE

    def __init__(self, shape: SlotShape) -> None:
        size = (shape.batch, shape.heads, shape.slots)
        self.mass = torch.full(size, UNKNOWN, dtype=torch.float32, device=shape.device)
        # How many slots had ever held a token when lengths were last asked for, and how many have
        # been forgotten since: numbers that all heads share, unlike the slots themselves.
        self.read = self.forgotten = 0

    def observe(self, report: AttentionReport) -> None:
        """Attention does not matter."""

    def forget(self, slots: Tensor) -> None:
        """The lengths of keys in slots that now hold other tokens are not known."""
        self.mass.scatter_(2, slots, UNKNOWN)
        self.forgotten += slots.shape[-1]

    def of(self, view: CacheView) -> Tensor:
        """Lengths of the cached keys, ``[B, H, S]``."""
        keys, held = view.keys, view.handed_out
        reading = self.mass[:, :, :held]
        # At most: a slot may have been forgotten twice.
        unknown = max(held - self.read, 0) + self.forgotten
        find_unknown(keys, reading, unknown)
        self.read, self.forgotten = held, 0
        return reading


def key_lengths(view: CacheView) -> Tensor:
    """Lengths of the cached keys, ``[B, H, S]``, float32.

    Known from before where the policy made a :class:`KeyLengths` for this layer.
    """
    known = view.find_observer(KeyLengths)
    return lengths(view.keys) if known is None else known.of(view)
