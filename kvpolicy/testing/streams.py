"""Streams: generated scenarios that policies are driven through.

A stream says everything about one generation except the policy: where tokens sit, how many come
and in which calls, how much may be cached, and what queries, keys and values look like. It is small
and printable, so that a failure can be read, and repeated by pasting it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvpolicy.cache.cache import PolicyCache, Reclaim
from kvpolicy.layout import OrderedLayout, RasterLayout, TextLayout, TokenLayout
from kvpolicy.policies.full import Full
from kvpolicy.policy.policy import EvictionPolicy

__all__ = ["Attention", "Dtype", "Stream", "Tokens", "streams"]

#: What attention looks like: unrelated queries and keys; the same mass for every visible token
#: (`uniform`: zero queries, `zeros`: zero keys); nearly all mass on few tokens; keys and queries
#: that repeat, so that masses tie exactly; and integers so far apart that masses are 0 or 1.
Attention = Literal["random", "uniform", "zeros", "peaked", "tied", "extreme"]

#: Of queries, keys and values.
Dtype = Literal["float32", "bfloat16", "float16", "float64"]

#: Most rows or tokens beyond what a policy needs before it has to evict.
_SPARE = 5
_MOST_ROWS = 64

_RECLAIMS: st.SearchStrategy[Reclaim] = st.sampled_from(get_args(Reclaim))


@dataclass(frozen=True)
class Tokens:
    """The tensors of a whole stream; the first dim is the layer.

    Attributes:
        query: ``[layers, B, G * H, T, D]``.
        key: ``[layers, B, H, T, D]``.
        value: ``[layers, B, H, T, D]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    def selected(self, index: Tensor) -> Tokens:
        """Those of the sequences ``index``, int64 ``[B]``."""
        return Tokens(self.query[:, index], self.key[:, index], self.value[:, index])

    def of_layer(self, layer: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of some positions, as a layer's call brings them."""
        query, key, value = (each[layer, :, :, part] for each in (self.query, self.key, self.value))
        return query, key, value

    def bring(self, cache: PolicyCache, part: slice, visible: Tensor | None = None) -> list[Tensor]:
        """Call every layer of a cache with some positions, one layer after the other.

        Args:
            cache: it has seen the tokens before ``part``.
            part: positions.
            visible: as for :meth:`kvpolicy.PolicyCache.attend`.

        Returns:
            Of each layer the output, ``[B, G * H, T, D]``.
        """
        return [
            cache.attend(layer, *self.of_layer(layer, part), visible=visible)
            for layer in range(len(self.query))
        ]


@dataclass(frozen=True)
class Stream:
    """One scenario.

    Attributes:
        layout: where tokens sit.
        tokens: how many come; less than the layout's length ends in mid-line.
        budget: evictable tokens per layer, on average over the layers.
        reclaim: ``lazy`` or ``eager``.
        layers: number of layers.
        batch: sequences.
        heads: KV heads.
        group: query heads per KV head.
        dim: head dim.
        calls: sizes of the calls that bring the tokens; the last one repeats.
        attention: what queries and keys look like.
        dtype: of queries, keys and values.
        seed: of queries, keys and values.
    """

    layout: RasterLayout | OrderedLayout | TextLayout
    tokens: int
    budget: int
    reclaim: Reclaim = "lazy"
    layers: int = 1
    batch: int = 1
    heads: int = 1
    group: int = 1
    dim: int = 4
    calls: tuple[int, ...] = (1,)
    attention: Attention = "random"
    dtype: Dtype = "float32"
    seed: int = 0

    def sizes(self) -> list[int]:
        """Tokens of each call; they add up to ``tokens``."""
        sizes: list[int] = []
        left = self.tokens
        while left:
            size = min(self.calls[min(len(sizes), len(self.calls) - 1)], left)
            sizes.append(size)
            left -= size
        return sizes

    def cache(self, policy: EvictionPolicy, budget: int | None = None) -> PolicyCache:
        """A cache that has seen none of the tokens; with another budget than the stream's own."""
        return PolicyCache(
            policy,
            self.budget if budget is None else budget,
            layout=self.layout,
            num_layers=self.layers,
            reclaim=self.reclaim,
        )

    def words(self) -> str:
        """The scenario in a sentence."""
        layout = self.layout
        ordered = isinstance(layout, OrderedLayout)
        grid = layout.grid if isinstance(layout, OrderedLayout) else layout
        if isinstance(grid, RasterLayout):
            layout = grid
            ends = " and a line break" if layout.line_break else ""
            where = f"an image of {layout.rows} lines of {_count(layout.cols, 'token')}{ends}"
            if layout.suffix:
                where += f", {_count(layout.suffix, 'token')} behind it"
            where += ", in an order of its own" if ordered else ""
        else:
            where = "a text" if layout.length is None else f"a text of {layout.length} tokens"
            where += f" in lines of {layout.line_length}"
        sizes = self.sizes()
        come, calls = "comes" if self.tokens == 1 else "come", "one by one"
        if max(sizes, default=1) > 1:
            runs = [(size, len(list(group))) for size, group in groupby(sizes)]
            calls = "in calls of " + ", ".join(
                str(size) if times == 1 else f"{size} ({times} times)" for size, times in runs
            )
        return (
            f"{where}, {layout.prefix} pinned; {_count(self.tokens, 'token')} {come} {calls}; "
            f"budget {self.budget} a layer; {_count(self.layers, 'layer')}, batch {self.batch}, "
            f"{_count(self.heads, 'KV head')} of {self.group} "
            f"{'queries' if self.group > 1 else 'query'}, {self.dim} dims; {self.dtype}, attention "
            f"{self.attention!r}; victims are reclaimed "
            f"{'lazily' if self.reclaim == 'lazy' else 'eagerly'}"
        )

    def draw(self, seed: int | None = None) -> Tokens:
        """Make the tensors; the same seed gives the same ones."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        query = self._vectors(self.heads * self.group, generator)
        key = self._vectors(self.heads, generator)
        value = torch.randn(key.shape, generator=generator)
        if self.attention == "uniform":
            query = torch.zeros_like(query)
        elif self.attention == "zeros":
            key = torch.zeros_like(key)
        elif self.attention == "peaked":
            query = query * 16
        dtype = getattr(torch, self.dtype)
        return Tokens(query.to(dtype), key.to(dtype), value.to(dtype))

    def _vectors(self, heads: int, generator: torch.Generator) -> Tensor:
        size = (self.layers, self.batch, heads, self.tokens, self.dim)
        if self.attention == "tied":
            table = torch.randn(2, self.dim, generator=generator)
            return table[torch.randint(2, size[:-1], generator=generator)]
        if self.attention == "extreme":
            # Their products and sums are exact in float32, in whatever order they are added.
            values = torch.tensor([-64.0, -1.0, -0.0, 0.0, 1.0, 64.0])
            return values[torch.randint(len(values), size, generator=generator)]
        return torch.randn(size, generator=generator)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _needs(policy: EvictionPolicy, layout: TokenLayout) -> int:
    """Budget that the policy asks for, but no more than there is to cache."""
    floor = policy.min_budget(layout)
    return floor if layout.evictable is None else min(floor, layout.evictable)


@st.composite
def _rasters(draw: st.DrawFn, policy: EvictionPolicy) -> RasterLayout:
    cols = draw(st.integers(1, 5), label="cols")
    line_break = draw(st.integers(0, 1), label="line_break")
    prefix = draw(st.integers(0, 8), label="prefix")
    suffix = draw(st.integers(0, 3), label="suffix")
    # Rows enough for a policy that needs much to have to evict all the same.
    tall = RasterLayout(rows=_MOST_ROWS, cols=cols, line_break=line_break, prefix=prefix)
    needs = -(-_needs(policy, tall) // tall.line_length)
    most = _SPARE if isinstance(policy, Full) else min(needs, _MOST_ROWS) + _SPARE
    rows = draw(st.integers(1, most), label="rows")
    return RasterLayout(rows=rows, cols=cols, line_break=line_break, prefix=prefix, suffix=suffix)


@st.composite
def _texts(draw: st.DrawFn, policy: EvictionPolicy) -> tuple[TextLayout, int]:
    sinks = draw(st.integers(0, 8), label="sinks")
    line_length = draw(st.integers(1, 4), label="line_length")
    endless = TextLayout(sinks=sinks, line_length=line_length)
    most = sinks + policy.min_budget(endless) + 4 * _SPARE
    tokens = draw(st.integers(1, most), label="tokens")
    # A full cache can't say what it needs of a text without a length.
    bounded = isinstance(policy, Full) or draw(st.booleans(), label="bounded")
    if not bounded:
        return endless, tokens
    length = max(tokens, sinks + 1) + draw(st.integers(0, 3), label="unused")
    return TextLayout(sinks=sinks, line_length=line_length, length=length), tokens


@st.composite
def streams(draw: st.DrawFn, policy: EvictionPolicy, reclaim: Reclaim | None = None) -> Stream:
    """Streams that suit a policy: from its smallest budget to more than there is to cache.

    Args:
        draw: given by hypothesis.
        policy: the policy; its ``min_budget`` sets the sizes.
        reclaim: ``lazy`` or ``eager``; both by default.
    """
    layout: RasterLayout | OrderedLayout | TextLayout
    if draw(st.integers(0, 2), label="text"):
        layout = grid = draw(_rasters(policy))
        places = range(grid.rows * grid.line_length)
        # A longer order would not be printed in full.
        if not policy.raster_only and len(places) <= 64 and draw(st.booleans(), label="ordered"):
            layout = OrderedLayout(grid=grid, order=draw(st.permutations(places), label="order"))
        whole = draw(st.booleans(), label="whole")
        tokens = grid.length if whole else draw(st.integers(1, grid.length), label="tokens")
    else:
        layout, tokens = draw(_texts(policy))
    floor = _needs(policy, layout)
    evictable = max(tokens - layout.prefix, 1) if layout.evictable is None else layout.evictable
    tight = draw(st.booleans(), label="tight")
    most = min(floor + 2, evictable + 2) if tight else evictable + 2
    budget = draw(st.integers(floor, max(floor, most)), label="budget")
    sizes = st.integers(1, max(tokens, 1))
    calls = draw(
        st.one_of(
            st.just((1,)),
            st.tuples(sizes, st.just(1)),
            st.lists(sizes, min_size=1, max_size=5).map(tuple),
        ),
        label="calls",
    )
    return Stream(
        layout=layout,
        tokens=tokens,
        budget=budget,
        reclaim=draw(st.just(reclaim) if reclaim else _RECLAIMS, label="reclaim"),
        layers=draw(st.integers(1, 3), label="layers"),
        batch=draw(st.integers(1, 3), label="batch"),
        heads=draw(st.integers(1, 3), label="heads"),
        group=draw(st.integers(1, 3), label="group"),
        dim=draw(st.sampled_from((4, 1, 16)), label="dim"),
        calls=calls,
        attention=draw(st.sampled_from(get_args(Attention)), label="attention"),
        dtype=draw(st.sampled_from(("float32", "float32", "float32", "bfloat16")), label="dtype"),
        seed=draw(st.integers(0, 2**16), label="seed"),
    )
