"""Sequential decoding: a pass of the model for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.decoding.decoder import (
    Advance,
    Decoded,
    Decoder,
    Rule,
    Step,
    check_prompt,
    checked_logits,
    prompt_logits,
    register_decoder,
    ruled,
)
from kvpolicy.decoding.sampling import Sampling, draw
from kvpolicy.layout import TokenLayout

__all__ = ["Sequential"]


@register_decoder("sequential")
class Sequential(Decoder):
    """One token a pass, drawn from what the model says behind all tokens before it."""

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
        """Draw ``count`` tokens in as many passes; see :meth:`Decoder.decode`."""
        check_prompt(prompt, count, layout)
        sampling = sampling or Sampling()
        first = prompt.shape[1]
        tokens = torch.cat([prompt, prompt.new_zeros(len(prompt), count)], dim=1)
        logits = prompt_logits(step, prompt)
        for place in range(first, first + count):
            chances = sampling.probabilities(ruled(rules, tokens, place, logits))
            newest = draw(chances, generator)
            tokens[:, place] = newest[:, 0]
            if advance is not None:
                advance(1)
            if place + 1 < first + count:
                logits = checked_logits(step(newest), newest)
        settled = torch.arange(1, count + 1, dtype=torch.int32, device=prompt.device)
        return Decoded(tokens, passes=count, settled=settled.expand(len(prompt), count))
