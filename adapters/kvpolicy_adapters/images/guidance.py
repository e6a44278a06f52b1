"""Classifier-free guidance whose unconditional half has a cache, and a policy, of its own.

transformers' ``guidance_scale`` makes the cache of its second half itself, so no policy can hold
it to a budget. Here it is a cache like the other, made by a second ``attach`` of the same model::

    with attach(model, ...) as cache, attach(model, ...) as second:
        guide = Guidance(3.0, model, second, negative_prompt)
        model.generate(prompt, cache=cache, logits_processor=[guide])
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import as_argument

__all__ = ["Guidance", "SecondHalf", "guided"]


def guided(scores: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + scale * (s - u)``, all ``[B, vocabulary]`` (Ho and Salimans, arXiv:2207.12598)."""
    return unconditional + scale * (scores - unconditional)


class SecondHalf:
    """A sequence that is generated along with another, in a cache of its own.

    Args:
        model: the model, attached.
        cache: the second cache.
    """

    def __init__(self, model: PreTrainedModel, cache: TransformersCache) -> None:
        self.model = model
        self.cache = cache

    def begin(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start anew with the ids ``[B, T]``; returns the logits after the last one."""
        self.cache.reset()
        self.mask = torch.ones_like(tokens) if mask is None else mask
        return self._logits(tokens)

    def go_on(self, tokens: Tensor) -> Tensor:
        """Append ids ``[B, T]``; returns the logits ``[B, vocabulary]`` after the last one."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        return self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        output = self.model(
            tokens, attention_mask=self.mask, use_cache=True, **as_argument(self.cache)
        )
        return output.logits[:, -1]


class Guidance(LogitsProcessor):
    """Guidance away from a negative prompt, for one call of ``generate``.

    Args:
        scale: 1 is no guidance.
        model: the model, attached.
        cache: the cache of the unconditional half.
        prompt: what the unconditional half begins with, ids ``[B, T]``.
        mask: its attention mask ``[B, T]``; everything by default.
    """

    def __init__(
        self,
        scale: float,
        model: PreTrainedModel,
        cache: TransformersCache,
        prompt: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        self.scale = scale
        self.half = SecondHalf(model, cache)
        self.prompt: Tensor | None = prompt
        self.mask = mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guide the scores ``[B, vocabulary]`` of the token behind ``input_ids`` ``[B, T]``."""
        if self.prompt is not None:
            unconditional = self.half.begin(self.prompt, self.mask)
            self.prompt = None
        else:
            unconditional = self.half.go_on(input_ids[:, -1:])
        return guided(scores, unconditional, self.scale)
