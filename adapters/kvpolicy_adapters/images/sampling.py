"""Sampling with random numbers of each row's own: a picture does not depend on its batch."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvpolicy import ParameterError, Sampling

__all__ = ["RowSampler"]


class RowSampler(LogitsProcessor):
    """Draws each row's token with one random number of that row, and leaves no other token.

    What comes behind has nothing left to choose, so that it is a rule for a sequential decoder, and
    a logits processor for any ``generate``; it must be the last. The token is the one where the
    cumulated probability passes the number; the same number and logits give the same token on any
    device. An object serves one generation.

    Args:
        chances: float64 ``[B, tokens]``, each from 0 up to 1: one for each token to come.
        sampling: temperature, top-k and top-p; plain sampling by default.
    """

    def __init__(self, chances: Tensor, sampling: Sampling | None = None) -> None:
        self._chances = chances
        self._sampling = sampling or Sampling()
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, V]`` in which each row's token alone is not ``-inf``.

        Raises:
            ParameterError: there are no random numbers left, or not as many rows as scores.
            AttentionError: the scores of a row are NaN. (Not on a GPU, where looking would wait.)
        """
        rows, count = self._chances.shape
        if scores.shape[0] != rows or self._step >= count:
            raise ParameterError(
                f"random numbers [{rows}, {count}] were given, but token {self._step} of "
                f"{scores.shape[0]} rows is to be drawn"
            )
        if self._chances.device != scores.device:
            self._chances = self._chances.to(scores.device)
        chance = self._chances[:, self._step : self._step + 1]
        self._step += 1
        cumulated = self._sampling.probabilities(scores).double().cumsum(-1)
        # The first token whose cumulated probability is above: one of no probability is never it.
        token = torch.searchsorted(cumulated, chance * cumulated[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
