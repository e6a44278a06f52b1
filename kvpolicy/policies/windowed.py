"""What policies that listen to the last queries share: pooling, and the rule for their windows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["check_window", "pool"]


def check_window(window: int, interval: int, kernel: int) -> None:
    """Refuse windows that reach behind the last decision, and kernels without a middle.

    Raises:
        ValueError: as pydantic's validators expect it.
    """
    if window > interval:
        raise ValueError(
            f"window={window} must be at most interval={interval}: votes are collected between "
            f"decisions"
        )
    if kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be odd")


def pool(mass: Tensor, positions: Tensor, kernel: int) -> Tensor:
    """Average each token's mass with its neighbours', in the order of positions.

    Args:
        mass: ``[B, H, S]``.
        positions: ``[B, H, S]``.
        kernel: neighbours, the token itself included, odd.

    Returns:
        ``[B, H, S]``; at the ends, the average is over the neighbours that there are.
    """
    order = positions.argsort(dim=-1)
    pooled = functional.avg_pool1d(
        mass.gather(2, order), kernel, stride=1, padding=kernel // 2, count_include_pad=False
    )
    return pooled.new_empty(pooled.shape).scatter_(2, order, pooled)
