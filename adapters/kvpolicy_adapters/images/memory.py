"""Work on a batch, in smaller pieces where memory is short."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_pieces", "out_of_memory"]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the processor's memory, had no room left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no class of its own for the processor's memory.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def in_pieces(work: Callable[[Tensor], Tensor], batch: Tensor, piece: int | None = None) -> Tensor:
    """``work(batch)``, a piece of the batch at a time.

    Args:
        work: of a tensor ``[n, ...]`` a tensor ``[n, ...]``, each row by itself.
        batch: ``[B, ...]``.
        piece: rows at a time; None for all at once, and half as many each time memory runs out.

    Raises:
        RuntimeError: not even one row at a time has room.
    """
    size = piece or max(1, len(batch))
    while True:
        try:
            return torch.cat([work(rows) for rows in batch.split(size)])
        except (RuntimeError, MemoryError) as error:
            if piece or size == 1 or not out_of_memory(error):
                raise
        size = -(-size // 2)  # outside the handler, which would keep the failed call's tensors
