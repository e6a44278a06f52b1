"""Pooling: each token's mass with its neighbours', in the order of positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.ops.cpu import native

__all__ = ["pool"]


def pool(
    mass: Tensor,
    positions: Tensor,
    *,
    newest: int,
    kernel: int,
    how: Literal["mean", "max"],
    share: bool = False,
) -> Tensor:
    """Pool each token's mass with its neighbours' among the cached tokens.

    Args:
        mass: ``[B, H, S]``, not negative.
        positions: ``[B, H, S]``, int32, -1 = empty.
        newest: tokens from this position on count as zero, and so does what is beyond either end.
        kernel: neighbours, the token itself included, odd.
        how: mean or max.
        share: whether masses count as shares of their sum over a head's tokens before ``newest``.

    Returns:
        ``[B, H, S]``, float32; empty slots get nothing that means anything.
    """
    mass = mass.to(torch.float32)
    served = native.serving("pool", mass)
    if served is not None:
        in_one_pass: Tensor = served(mass, positions, newest, kernel, how == "mean", share)
        return in_one_pass
    mass = mass.masked_fill((positions >= newest) | (positions < 0), 0.0)
    if share:
        mass.div_(mass.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny))
    order = positions.argsort(dim=-1)
    pooling = functional.avg_pool1d if how == "mean" else functional.max_pool1d
    pooled: Tensor = pooling(mass.gather(2, order), kernel, stride=1, padding=kernel // 2)
    return pooled.new_empty(pooled.shape).scatter_(2, order, pooled)
