"""Parallel decoding: groups of tokens at once, in an order in which they need each other little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.decoding.decoder import (
    Advance,
    Decoded,
    Decoder,
    Rule,
    check_prompt,
    register_decoder,
    staging_cache,
)
from kvpolicy.decoding.sampling import Sampling, draw
from kvpolicy.errors import LayoutError, ParameterError, ShapeError
from kvpolicy.layout import OrderedLayout, RasterLayout, TokenLayout

__all__ = ["GroupStep", "Parallel"]


class GroupStep(Protocol):
    """A model that is asked for tokens by where they are, not by what comes before them."""

    def __call__(self, tokens: Tensor, ask: int, /) -> Tensor:
        """Cache the tokens ``[B, T]``, and behind them ``ask`` position queries.

        The tokens are those that come next in the cache's layout, and the queries ask for the
        ``ask`` that come after them. Tokens see each other and all that is cached; queries see
        each other, the tokens, and all that is cached; no token sees a query. Whoever calls takes
        the queries back.

        Returns:
            Logits ``[B, ask, V]``, of the tokens asked for.
        """


@register_decoder("lpd")
class Parallel(Decoder):
    """Locality-aware parallel decoding: an image in few passes, a group of tokens each.

    The tokens of a group are drawn independently of each other, so they should be far apart, and
    near to what has been drawn (Zhang et al., "Locality-aware Parallel Decoding for Efficient
    Autoregressive Image Generation", arXiv:2507.01957). A pass caches the tokens of the group
    before and attends from position queries for the next one. Queries are staged tokens of which
    none is committed: they take slots while they attend, within the budget, and leave no key
    behind.

    The layout says what comes when: make the cache with ``layout=decoder.ordered(grid)``.

    Example:
        >>> grid = RasterLayout(rows=16, cols=16, prefix=1)
        >>> Parallel(passes=20).ordered(grid).groups[:5]
        (1, 2, 4, 5, 7)
    """

    passes: int = Field(48, ge=1, description="groups in which an image comes")
    repulsion: int = Field(2, ge=0, description="rows and columns that a group keeps apart")
    proximity: float = Field(1.0, ge=0, description="sum of 1/distance at which a place is near")
    order_seed: int = Field(0, ge=0, description="seed of the order")

    def ordered(self, grid: RasterLayout) -> OrderedLayout:
        """The layout of an image that this decoder draws.

        Raises:
            ParameterError: the image has fewer tokens than there are passes.
        """
        return OrderedLayout.locality_aware(
            grid,
            self.passes,
            repulsion=self.repulsion,
            proximity=self.proximity,
            seed=self.order_seed,
        )

    def check(self, layout: TokenLayout) -> None:
        """Refuse what is no :class:`OrderedLayout` in as many groups as there are passes."""
        if not isinstance(layout, OrderedLayout):
            raise LayoutError(
                f"decoder {self.label!r} draws in groups, and {layout!r} has none: make the cache "
                f"with layout=decoder.ordered(grid), for a model that answers position queries; "
                f"'sequential' and 'sjd' draw in raster order"
            )
        if len(layout.groups) != self.passes:
            raise ParameterError(
                f"decoder {self.label!r} draws in {self.passes} passes, and the cache's layout has "
                f"{len(layout.groups)} groups; make the cache with layout=decoder.ordered(grid)"
            )

    @torch.no_grad()
    def decode(
        self,
        step: Any,
        cache: Any,
        prompt: Tensor,
        count: int,
        *,
        sampling: Sampling | None = None,
        layout: TokenLayout | None = None,
        rules: Sequence[Rule] = (),
        generator: torch.Generator | None = None,
        advance: Advance | None = None,
    ) -> Decoded:
        """Draw a whole image, in the order in which its tokens come.

        Args:
            step: a :class:`GroupStep`.
            cache: as of :meth:`Decoder.decode`.
            prompt: the prefix of the layout, int64 ``[B, P]``.
            count: tokens of the image: all of them.
            sampling: as of :meth:`Decoder.decode`.
            layout: an :class:`OrderedLayout`; the cache's by default.
            rules: none; a grammar reads tokens from left to right.
            generator: as of :meth:`Decoder.decode`.
            advance: is told how far it has come.

        Returns:
            Tokens by arrival; ``layout.to_raster(tokens)`` puts them where they belong.

        Raises:
            ParameterError: an option is out of range, there are rules, or the cache can't stage.
            LayoutError: the layout has no groups, or count is not the whole image.
            ShapeError: the prompt, or what ``step`` returns, has another shape.
        """
        cache = staging_cache(cache)
        layout = cache.layout if layout is None else layout
        if layout is None:
            raise LayoutError(f"decoder {self.label!r} must know the layout before the prompt")
        self.check(layout)
        assert isinstance(layout, OrderedLayout)
        check_prompt(prompt, count, layout)
        if rules:
            raise ParameterError(
                f"decoder {self.label!r} draws tokens in groups, and rules read them from left to "
                f"right; draw with 'sequential' or 'sjd', or without rules"
            )
        if prompt.shape[1] != layout.prefix or count != len(layout.order):
            raise LayoutError(
                f"decoder {self.label!r} draws a whole image behind its prefix: a prompt of "
                f"{layout.prefix} tokens and count={len(layout.order)}, not {prompt.shape[1]} and "
                f"{count}"
            )
        sampling = sampling or Sampling()
        drawn, settled = [prompt], []
        for number, size in enumerate(layout.groups, start=1):
            newest = drawn[-1]
            with cache.stage(newest.shape[1] + size):
                logits = step(newest, size)
                if not isinstance(logits, Tensor) or logits.shape[:-1] != (len(prompt), size):
                    told = logits.shape if isinstance(logits, Tensor) else type(logits).__name__
                    raise ShapeError(
                        f"step returned {told} when asked for {size} tokens; expected logits "
                        f"[{len(prompt)}, {size}, V]"
                    )
                cache.commit(newest.shape[1])
            drawn.append(draw(sampling.probabilities(logits), generator))
            settled += [number] * size
            if advance is not None:
                advance(size)
        when = torch.tensor(settled, dtype=torch.int32, device=prompt.device)
        return Decoded(
            torch.cat(drawn, dim=1), passes=self.passes, settled=when.expand(len(prompt), count)
        )
