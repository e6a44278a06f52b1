"""Sampling with random numbers of each row's own: a picture does not depend on its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvpolicy import AttentionError, ParameterError

__all__ = ["RowSampler"]


class RowSampler(LogitsProcessor):
    """Draws each row's token with one random number of that row, and leaves no other token.

    What comes behind (``multinomial``, ``argmax``) has nothing left to choose, so that it works
    with any ``generate``, with and without ``do_sample``. The token is the one where the cumulated
    probability passes the number; the same number and logits give the same token on any device. It
    must be the last logits processor, and an object serves one call of ``generate``.

    Args:
        chances: float64 ``[B, tokens]``, each from 0 up to 1: one for each token to come.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the likeliest so many tokens; 0 for all.
        top_p: only the likeliest tokens that have this probability together; 1 for all.
    """

    def __init__(
        self, chances: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> None:
        self._chances = chances
        self._greedy = temperature == 0
        self._step = 0
        self._warp: Any = LogitsProcessorList()
        if temperature not in (0, 1):
            self._warp.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._warp.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._warp.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, V]`` in which each row's token alone is not ``-inf``.

        Raises:
            ParameterError: there are no random numbers left, or not as many rows as scores.
        """
        token = self.draw(input_ids, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def draw(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The tokens, int64 ``[B, 1]``, of scores ``[B, V]``; errors as of a call.

        Raises:
            AttentionError: the scores of a row are NaN. (Not on a GPU, where looking would wait.)
        """
        rows, count = self._chances.shape
        if scores.shape[0] != rows or self._step >= count:
            raise ParameterError(
                f"random numbers [{rows}, {count}] were given, but token {self._step} of "
                f"{scores.shape[0]} rows is to be drawn"
            )
        if self._greedy:
            self._step += 1
            return scores.argmax(-1, keepdim=True)
        if self._chances.device != scores.device:
            self._chances = self._chances.to(scores.device)
        chance = self._chances[:, self._step : self._step + 1]
        self._step += 1
        cumulated = self._warp(input_ids, scores.float()).softmax(-1).double().cumsum(-1)
        total = cumulated[:, -1:]
        if scores.device.type == "cpu" and not bool(total.isfinite().all()):
            raise AttentionError("the logits of an image are NaN; look at the model's weights")
        # The first token whose cumulated probability is above: one of no probability is never it.
        return torch.searchsorted(cumulated, chance * total, right=True)
