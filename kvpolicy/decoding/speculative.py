"""Speculative Jacobi decoding: a pass looks at many drafts, and keeps those that sampling would.

A draft is a guess of a token that is still to come. A pass of the model over the newest token and
the drafts behind it gives the distribution p of each of their places, and a draft that was drawn
from q is kept if u < p / q; at the first one that is not, a token is drawn from what p has more
than q, and the pass ends there. What is kept is then exactly what one token a pass would have drawn
(Teng et al., arXiv:2410.01699). Drafts behind the failure become drafts of the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.decoding.decoder import (
    Advance,
    Decoded,
    Decoder,
    Rule,
    StagingCache,
    Step,
    check_prompt,
    checked_logits,
    prompt_logits,
    register_decoder,
    ruled,
    staging_cache,
)
from kvpolicy.decoding.sampling import Sampling, couple, draw
from kvpolicy.errors import ParameterError
from kvpolicy.layout import TokenLayout, refuse_other_orders

__all__ = ["Drafts", "SpeculativeJacobi", "speculative_jacobi"]

#: How a place of the window gets its first draft.
Draft = Literal["above", "left", "last", "uniform"]


@register_decoder("sjd")
class SpeculativeJacobi(Decoder):
    """Speculative Jacobi decoding: as many tokens a pass as its drafts guess right.

    The tokens are drawn from exactly the distribution that :class:`Sequential` draws them from,
    over any cache that can stage. In a batch every sequence keeps what it has settled, and the
    window begins behind the slowest.

    Args:
        window: tokens that a pass looks at: the newest one, and drafts.
        draft: what a place is first guessed to be: the token ``above`` it in the image (to its left
            in the first line, and in text), the one to its ``left``, a draw from the ``last``
            distribution of the pass before, or any token, ``uniform``.
        coupled: how drafts behind a failure go on: kept as often as can be while each is still a
            draw from this pass's distribution (arXiv:2603.18599), or all drawn afresh (the
            original rule).
    """

    window: Annotated[int, Field(ge=2)] = 32
    draft: Draft = "above"
    coupled: bool = True

    def check(self, layout: TokenLayout) -> None:
        """Refuse a window that no sequence of this layout could fill, and drafts from no line.

        Raises:
            ParameterError: it is longer than the layout.
            LayoutError: drafts are taken from the line above, and there are no lines.
        """
        if layout.length is not None and self.window > layout.length:
            raise ParameterError(
                f"decoder {self.label!r}: window={self.window} is longer than the "
                f"{layout.length} tokens of {layout!r}; the largest that works is {layout.length}"
            )
        if self.draft == "above":
            refuse_other_orders(layout, f"decoder {self.label!r}")

    @torch.no_grad()
    def decode(
        self,
        step: Step,
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
        """Draw ``count`` tokens in as few passes as the drafts allow; see :meth:`Decoder.decode`.

        Raises:
            ParameterError: the cache can't stage, or the window is longer than the layout.
        """
        cache = staging_cache(cache)
        layout = cache.layout if layout is None else layout
        check_prompt(prompt, count, layout)
        if layout is not None:
            self.check(layout)
        sampling = sampling or Sampling()
        first, end = prompt.shape[1], prompt.shape[1] + count
        tokens = torch.cat([prompt, prompt.new_zeros(len(prompt), count)], dim=1)
        logits = prompt_logits(step, prompt)
        if layout is None:  # some are known behind the prompt
            layout = cache.layout
            check_prompt(prompt, count, layout)
            if layout is not None:
                self.check(layout)
        chances = sampling.probabilities(ruled(rules, tokens, first, logits))
        tokens[:, first] = draw(chances[:, 0], generator)
        settled = torch.ones(len(prompt), count, dtype=torch.int32, device=prompt.device)
        drafts = Drafts(
            self,
            tokens,
            known=tokens.new_full((len(prompt),), first + 1),
            chances=chances.new_zeros(len(prompt), self.window, chances.shape[-1]),
            newest=chances[:, 0],
        )
        # The newest token that is known everywhere; those before it are cached.
        start, passes = first, 1
        if advance is not None:
            advance(1)
        with cache.stage(lookahead=self.window, together=True):
            while start + 1 < end:
                fed = drafts.feed(start, layout, generator)
                logits = ruled(rules, tokens, start + 1, checked_logits(step(fed), fed))
                before, passes = drafts.known, passes + 1
                kept = int(
                    drafts.settle(start, sampling.probabilities(logits), generator).min().item()
                )
                places = torch.arange(first, end, device=prompt.device)
                fresh = (places >= before[:, None]) & (places < drafts.known[:, None])
                settled.masked_fill_(fresh, passes)
                cache.commit(kept)
                start += kept
                if advance is not None:
                    advance(kept)
        return Decoded(tokens, passes, settled)


def speculative_jacobi(
    step: Step, cache: StagingCache, prompt: Tensor, count: int, *, window: int = 32, **options: Any
) -> Decoded:
    """Speculative Jacobi decoding in one call.

    Args:
        step: caches tokens ``[B, T]``, and returns logits ``[B, T, V]``.
        cache: the one that ``step`` writes to.
        prompt: int64 ``[B, P]``.
        count: tokens to draw.
        window: tokens that a pass looks at.
        **options: of :meth:`Decoder.decode`; and ``draft`` and ``coupled``, of
            :class:`SpeculativeJacobi`.

    Raises:
        ParameterError, LayoutError, ShapeError: as :meth:`Decoder.decode`.
    """
    own = {name: options.pop(name) for name in ("draft", "coupled") if name in options}
    decoder = SpeculativeJacobi(window=window, **own)
    return decoder.decode(step, cache, prompt, count, **options)


@dataclass
class Drafts:
    """The tokens of a batch: known ones, drafts behind them, and what those were drawn from.

    Attributes:
        decoder: how drafts begin and go on.
        tokens: of the whole sequence, int64 ``[B, L]``: known ones, then drafts.
        known: of each sequence, how many are known, int64 ``[B]``.
        chances: the distribution that the draft of place t was drawn from, ``[B, window, V]`` at
            t modulo the window.
        newest: the distribution that the newest place was given, ``[B, V]``.
        begun: the place before which drafts have been made.
    """

    decoder: SpeculativeJacobi
    tokens: Tensor
    known: Tensor
    chances: Tensor
    newest: Tensor
    begun: int = 0

    def feed(
        self, start: int, layout: TokenLayout | None, generator: torch.Generator | None
    ) -> Tensor:
        """The next pass's tokens, ``[B, T]``, from place ``start`` on, drafts made where missing.

        The last token of the sequence is not among them: nothing comes behind it.
        """
        stop = min(start + self.decoder.window, self.tokens.shape[1] - 1)
        begun = max(self.begun, start + 1)
        if begun < stop:
            self._begin(begun, stop, layout, generator)
        self.begun = max(begun, stop)
        return self.tokens[:, start:stop]

    def _begin(
        self, begun: int, stop: int, layout: TokenLayout | None, generator: torch.Generator | None
    ) -> None:
        """First drafts of the places ``begun`` to ``stop - 1``."""
        ring = [place % self.decoder.window for place in range(begun, stop)]
        size = (len(self.tokens), stop - begun)
        if self.decoder.draft in ("last", "uniform"):
            chances = self.newest
            if self.decoder.draft == "uniform":
                chances = torch.full_like(chances, 1 / chances.shape[-1])
            self.chances[:, ring] = chances.unsqueeze(1)
            self.tokens[:, begun:stop] = draw(
                chances.unsqueeze(1).expand(*size, chances.shape[-1]), generator
            )
            return
        # Guesses that are no draws: each is certain, and has all of its place's probability.
        source: list[int] = []
        for place in range(begun, stop):
            guess = _above(place, layout) if self.decoder.draft == "above" else place - 1
            source.append(guess if guess < begun else source[guess - begun])
        drafts = self.tokens[:, source]
        self.tokens[:, begun:stop] = drafts
        certain = self.chances.new_zeros(*size, self.chances.shape[-1])
        self.chances[:, ring] = certain.scatter_(-1, drafts.unsqueeze(-1), 1.0)

    def settle(self, start: int, chances: Tensor, generator: torch.Generator | None) -> Tensor:
        """Judge the drafts of a pass; returns how many of its tokens can be cached, int64 ``[B]``.

        Args:
            start: place of the first token that was fed.
            chances: of the places behind each token that was fed, float32 ``[B, T, V]``.
            generator: where chance comes from.
        """
        count = chances.shape[1]
        places = torch.arange(start + 1, start + count + 1, device=chances.device)
        ring = places % self.decoder.window
        drafts = self.tokens[:, start + 1 : start + count + 1]
        coupled, kept = couple(drafts, self.chances[:, ring], chances, generator)
        known = places < self.known[:, None]
        kept |= known
        # There is no draft yet of the place behind the last token.
        kept[:, -1] &= known[:, -1]
        # The first place whose draft was not kept; it is known all the same.
        failed = torch.where(kept, count - 1, torch.arange(count, device=kept.device)).amin(1)
        place = torch.arange(count, device=kept.device)
        drawn = coupled
        if not self.decoder.coupled:
            drawn = torch.where(place <= failed[:, None], coupled, draw(chances, generator))
        drawn[:, -1] = draw(chances[:, -1], generator)
        settled = torch.where(known, drafts, drawn)
        self.tokens[:, start + 1 : start + count + 1] = settled
        # What was drawn or renewed is a draw from this pass's distribution; what is known, is.
        self.chances[:, ring] = chances
        self.newest = chances[:, -1]
        self.begun = max(self.begun, start + count + 1)
        self.known = torch.maximum(self.known, start + failed + 2)
        return self.known - start - 1


def _above(place: int, layout: TokenLayout | None) -> int:
    """The place above in the grid; the one to the left where there is none."""
    if layout is None or layout.line(place) < 1:
        return place - 1
    return place - layout.line_length
