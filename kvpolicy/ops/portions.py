"""Portions: so many sequences at once that matrices of slot by slot stay small.

On a CPU, what is made next is read from near by then, and no memory is asked of the system again
and again; on a GPU, larger portions keep it busy.
"""

from __future__ import annotations

import torch

__all__ = ["NEAR", "portions"]

#: Numbers of the matrices of a portion on a CPU: 1 MiB of float32.
NEAR = 1 << 18
_ELSEWHERE = 1 << 24


def portions(batch: int, numbers: int, device: torch.device, *, near: bool = True) -> list[slice]:
    """Portions of a batch.

    Args:
        batch: sequences.
        numbers: of the matrices of one sequence.
        device: where they lie.
        near: whether they should stay near a CPU.
    """
    most = NEAR if near and device.type == "cpu" else _ELSEWHERE
    step = max(most // max(numbers, 1), 1)
    return [slice(first, first + step) for first in range(0, batch, step)]
