"""Lengths of keys, and finding only those that are not known yet."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.cpu import native

__all__ = ["UNKNOWN", "find_unknown", "lengths"]

#: A reading below any length: not known.
UNKNOWN = -1.0


def lengths(keys: Tensor) -> Tensor:
    """Euclidean lengths of keys ``[B, H, S, D]``: ``[B, H, S]``, float32."""
    exact = torch.promote_types(keys.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(keys, dim=-1, dtype=exact)
    return found.to(torch.float32)


def find_unknown(keys: Tensor, reading: Tensor, unknown: int) -> None:
    """Find the lengths of keys that are not known, in place.

    Args:
        keys: ``[B, H, S, D]``.
        reading: lengths, ``[B, H, S]``, float32, below zero where one is not known.
        unknown: how many of a head are not known, at most.
    """
    served = native.serving("key_lengths", keys) if keys.dtype in native.DTYPES else None
    if served is not None:
        served(keys, reading)
    elif 4 * unknown > reading.shape[2]:
        reading[:] = lengths(keys)
    elif unknown:
        # The unknown are the lowest. Not argmin: to it, NaN is lower.
        slots = reading.topk(unknown, dim=-1, largest=False).indices
        index = slots.unsqueeze(-1).expand(*slots.shape, keys.shape[-1])
        reading.scatter_(2, slots, lengths(keys.gather(2, index)))
