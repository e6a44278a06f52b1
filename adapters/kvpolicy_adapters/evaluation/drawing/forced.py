"""TeacherForced: a decoder that draws what it is told, and says how likely that was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ConfigDict, PrivateAttr
from torch import Tensor

from kvpolicy import Decoded, Decoder, ParameterError, Rule, Sampling, Step, TokenLayout

__all__ = ["TeacherForced"]

#: Tokens a call of the model, whose logits of a large vocabulary would not fit otherwise.
_PIECE = 256


class TeacherForced(Decoder):
    """Feeds given tokens, several a pass; what a cache evicts is the same as one by one.

    Put in a decoder's place, it scores real images through everything that drawing has: prompts and
    their padding, the grammar of the image, the policy.

    Attributes:
        tokens: int64 ``[B, count]``, line breaks and what else the grammar demands included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    tokens: Tensor
    _nats: list[Tensor] = PrivateAttr(default_factory=list)

    @property
    def nats(self) -> Tensor:
        """Minus the logarithm of each token's probability, float64 ``[B, count]``.

        Taken after the grammar: what it demands costs nothing.
        """
        return torch.cat(self._nats, dim=1)

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
        advance: Any = None,
    ) -> Decoded:
        """Feed the tokens behind a prompt; see :meth:`kvpolicy.Decoder.decode`.

        Raises:
            ParameterError: they are not so many, the grammar forbids one, or a temperature or a
                limit is asked for, under which they would have other probabilities.
        """
        if sampling not in (None, Sampling()):
            raise ParameterError(f"real images are scored by plain probabilities, not {sampling}")
        if self.tokens.shape != (len(prompt), count):
            raise ParameterError(
                f"{list(self.tokens.shape)} tokens, where the model draws {[len(prompt), count]}"
            )
        tokens = self.tokens.to(prompt.device)
        whole = torch.cat([prompt, tokens], dim=1)
        first, place, passes = prompt.shape[1], 0, 1
        logits = step(prompt)[:, -1:]
        while True:
            for behind in logits.unbind(1):
                scores = behind
                for rule in rules:
                    scores = rule(whole[:, : first + place], scores)
                chosen = scores.float().log_softmax(-1).gather(1, tokens[:, place, None])
                if not bool(chosen.isfinite().all()):
                    raise ParameterError(
                        f"token {place} of an image is {tokens[:, place].tolist()}, which the "
                        f"model never draws there"
                    )
                self._nats.append(-chosen.double().cpu())
                place += 1
            if place == count:
                break
            logits = step(tokens[:, place - 1 : min(place - 1 + _PIECE, count - 1)])
            passes += 1
        settled = torch.full_like(tokens, passes, dtype=torch.int32)
        return Decoded(whole, passes=passes, settled=settled)
