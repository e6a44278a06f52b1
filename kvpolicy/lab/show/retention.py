"""Retention: which tokens of an image are still cached, as shares of heads, out of a trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpolicy.errors import ParameterError
from kvpolicy.tracing.trace import Trace

__all__ = ["retention"]


def retention(
    found: Trace, moments: Sequence[int], *, item: int = 0, head: int | None = None
) -> NDArray[np.float64]:
    """The share of heads that hold each token of the grid, at moments and in layers.

    Args:
        found: a trace of an image.
        moments: tokens of the image that have come.
        item: which of the traced sequences.
        head: one KV head, whose shares are 0 and 1; all by default.

    Returns:
        ``[moments, layers, rows, cols]``; line-break tokens are left out.

    Raises:
        ParameterError: the trace has no grid, or not this item, head or moment.
    """
    if found.grid is None:
        raise ParameterError(f"a trace of {found.layout} has no grid to look at")
    rows, cols, prefix = (found.grid[name] for name in ("rows", "cols", "prefix"))
    line = cols + found.grid["line_break"]
    total = min(rows * line, found.seen - prefix)
    shares = np.zeros((len(moments), len(found.layers), rows * line))
    places = np.arange(rows * line) if found.order is None else found.order.numpy()
    for place, layer in enumerate(found.layers[index] for index in sorted(found.layers)):
        size = layer.gone.shape
        if not 0 <= item < size[0] or not (head is None or 0 <= head < size[1]):
            raise ParameterError(
                f"item={item}, head={head}: the trace has {size[0]} items and {size[1]} heads"
            )
        for number, moment in enumerate(moments):
            if not 0 <= moment <= total:
                raise ParameterError(f"moments: {moment} is not within the image's {total} tokens")
            held = layer.held(moment + prefix)[item, :, prefix:].double()
            held = held.mean(0) if head is None else held[head]
            shares[number, place, places[:moment]] = held[:moment].numpy()
    return shares.reshape(len(moments), len(found.layers), rows, line)[..., :cols]
