"""Watching where heads look: what a query gives to a cached token, by where it lies from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.errors import CacheStateError, ParameterError
from kvpolicy.layout import OrderedLayout, TokenLayout
from kvpolicy.parts.offsets import HeadOffsets, OffsetAttention

__all__ = ["OffsetRecord", "watch_offsets"]


class _HasPolicyCache(Protocol):
    @property
    def policy_cache(self) -> PolicyCache: ...


class OffsetRecord:
    """Attention by offset so far; what :func:`watch_offsets` gives.

    What counts is what a query gives to image tokens that came before it, or before its group. Of
    a decoder that draws in groups, a query is the position query, which comes first, and not the
    token that is cached in its place a pass later; of one that speculates, the first draft.
    """

    def __init__(self, cache: PolicyCache, radius: int) -> None:
        if isinstance(radius, bool) or not isinstance(radius, int) or not 0 <= radius <= 64:
            raise ParameterError(f"radius={radius!r} must be a whole number from 0 to 64")
        layout, evicting = cache.layout, cache.policy.label
        if layout is None or layout.evictable is None:
            raise ParameterError(
                f"offsets are watched where it is known how many tokens come and where; this "
                f"cache has layout={layout!r}"
            )
        if any(layer.budget < layout.evictable for layer in cache.layers):
            raise CacheStateError(
                f"this cache evicts (policy {evicting!r}), and what is gone gets no attention; "
                f"watch one with policy 'full'"
            )
        if "attend" in vars(cache):
            raise CacheStateError("this cache is being watched already")
        self.radius = radius
        self._cache, self._layout = cache, layout
        #: Positions that have attended before, layer by layer.
        self._come = [0] * len(cache.layers)
        #: Of each layer, the sum of what was given by offset, the last for what is far, float64
        #: ``[H, (2R + 1)^2 + 1]``; and to how many tokens, ``[(2R + 1)^2 + 1]``.
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._queries = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> Tensor:
        """As :meth:`PolicyCache.attend`; and look at what is given to what."""
        output, weights = self._cache.attend_with_weights(layer, query, key, value, **terms)
        self._look(layer, weights.detach(), key.shape[1])
        return output

    def _look(self, layer: int, weights: Tensor, heads: int) -> None:
        """Add weights ``[B, G * H, T, seen + T]`` of the queries that had not come before."""
        count, length = weights.shape[2:]
        begin = length - count
        first = max(begin, self._layout.prefix, self._come[layer] if begin else 0)
        self._come[layer] = length
        if first >= length:
            return
        newest = weights[:, :, first - begin :].double()
        mass = newest.view(len(newest), heads, -1, *newest.shape[2:]).mean(2)
        place, pairs = self._offsets(first, length)
        place, pairs = place.flatten().to(mass.device), pairs.flatten().to(mass.device)
        size = (2 * self.radius + 1) ** 2 + 1
        if layer not in self._sums:
            self._sums[layer] = (mass.new_zeros(heads, size), mass.new_zeros(size))
        given, often = self._sums[layer]
        given.index_add_(1, place, mass.sum(0).flatten(1) * pairs)
        often.index_add_(0, place, pairs * len(mass))
        self._queries += len(mass) * (length - first) if layer == min(self._sums) else 0

    def _offsets(self, first: int, length: int) -> tuple[Tensor, Tensor]:
        """Of queries from ``first`` on and all positions: index of the offset, and 1 if it counts.

        Both ``[T, length]``.
        """
        layout, radius = self._layout, self.radius
        position = torch.arange(length)
        row, column = layout.line(position), layout.column(position)
        down, across = (at - at[first:, None] for at in (row, column))
        place = (down + radius) * (2 * radius + 1) + across + radius
        near = (down.abs() <= radius) & (across.abs() <= radius)
        place = place.masked_fill(~near, (2 * radius + 1) ** 2)
        before = torch.tensor([_before(layout, query) for query in range(first, length)])
        counts = (position >= layout.prefix) & (position < before.unsqueeze(-1))
        return place, counts.double()

    def finish(self, subject: str) -> OffsetAttention:
        """What has been seen so far, to be written with ``text()``.

        An offset at which no token has lain counts as far.

        Args:
            subject: what was watched, for whoever reads the file.

        Raises:
            CacheStateError: nothing has been drawn, or not by every layer.
        """
        missing = [n for n in range(len(self._come)) if n not in self._sums]
        if missing:
            raise CacheStateError(
                f"no query of layer {missing[0]} has been watched; draw or score images first"
            )
        layers = []
        for layer in sorted(self._sums):
            given, often = (each.cpu() for each in self._sums[layer])
            mean = given / often.clamp(min=1)
            mean = torch.where(often > 0, mean, mean[:, -1:]).clamp_(max=1)
            side = 2 * self.radius + 1
            layers.append(
                [
                    HeadOffsets(near=head[:-1].view(side, side).tolist(), far=float(head[-1]))
                    for head in mean
                ]
            )
        return OffsetAttention(
            subject=subject,
            layout=repr(self._layout),
            queries=self._queries,
            radius=self.radius,
            layers=layers,
        )


@contextmanager
def watch_offsets(
    cache: PolicyCache | _HasPolicyCache, *, radius: int = 5
) -> Iterator[OffsetRecord]:
    """Watch where heads look while a block runs, by where it lies from them.

    For the policy ``ahead``, which takes the file as ``offsets``. It says what the model does, and
    is measured once for a model.

    Example::

        with attach(model, policy="full", layout=layout) as cache, watch_offsets(cache) as seen:
            model.sample_tokens(...)
        Path("offsets.json").write_text(seen.finish("my model").text())

    Args:
        cache: that keeps everything. It serves as ever, and more slowly.
        radius: rows and columns up to which offsets are told apart.

    Raises:
        ParameterError: the radius is out of range, or the layout or its length is not known.
        CacheStateError: the cache evicts, or is being watched already.
    """
    inner = cache if isinstance(cache, PolicyCache) else cache.policy_cache
    record = OffsetRecord(inner, radius)
    vars(inner)["attend"] = record.attend
    try:
        yield record
    finally:
        del vars(inner)["attend"]


def _before(layout: TokenLayout, query: int) -> int:
    """Position of the first token that came with a query."""
    return layout.group(query).start if isinstance(layout, OrderedLayout) else query
