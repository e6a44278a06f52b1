"""Sampling: from logits to probabilities, and from probabilities to tokens."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kvpolicy.errors import AttentionError, parameter_error

__all__ = ["Sampling", "couple", "draw"]


class Sampling(BaseModel):
    """Which distribution tokens are drawn from: temperature, then top-k, then top-p.

    Example:
        >>> import torch
        >>> Sampling(temperature=0.0).probabilities(torch.tensor([0.1, 2.0, 1.0])).tolist()
        [0.0, 1.0, 0.0]

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the likeliest so many tokens, and those that are as likely; 0 for all.
        top_p: only the likeliest tokens that have this probability together; 1 for all.

    Raises:
        ParameterError: a field is unknown, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise parameter_error("Sampling", type(self), error) from None

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution of each place, float32 ``[..., V]``, of logits ``[..., V]``.

        Raises:
            AttentionError: logits are NaN, or all of a place are ``-inf``. (Not on a GPU, where
                looking would cost a wait.)
        """
        scores = logits.float()
        if self.temperature == 0:
            chances = torch.zeros_like(scores)
            chances.scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
            # An argmax of nothing but -inf would be the first token.
            return _checked(chances + 0.0 * scores.amax(-1, keepdim=True))
        if self.temperature != 1:
            scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            scores = scores.masked_fill(_outside(scores, self.top_p), -torch.inf)
        return _checked(scores.softmax(-1))


def _outside(scores: Tensor, share: float) -> Tensor:
    """Which scores ``[..., V]`` are not among the likeliest that have this share together."""
    ordered, order = scores.sort(dim=-1)  # the least likely first; the likeliest always stays
    gone = ordered.softmax(-1).cumsum(-1) <= 1 - share
    gone[..., -1] = False
    return torch.zeros_like(gone).scatter_(-1, order, gone)


def _checked(chances: Tensor) -> Tensor:
    """The same, if they are probabilities."""
    if chances.device.type == "cpu" and not bool(chances.sum().isfinite()):
        raise AttentionError(
            "the logits of a place are NaN, or no token may come there; look at the model, or at "
            "the rules that were given"
        )
    return chances


def draw(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token, int64 ``[...]``, from distributions ``[..., V]`` that need not sum to 1."""
    flat = chances.reshape(-1, chances.shape[-1])
    return flat.multinomial(1, generator=generator).view(chances.shape[:-1])


def couple(
    token: Tensor, old: Tensor, new: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Make draws from one distribution draws from another, changing as few as can be.

    A token x that was drawn from q is kept if u < p(x) / q(x), u uniform in [0, 1); otherwise one
    is drawn from max(p - q, 0), normalised. The result is a draw from p (Leviathan et al.,
    arXiv:2211.17192), and equals x with probability sum min(p, q): a maximal coupling.

    Args:
        token: int64 ``[...]``.
        old: what each was drawn from, ``[..., V]``.
        new: what each is to be drawn from, ``[..., V]``.
        generator: where chance comes from.

    Returns:
        Tokens ``[...]``, and whether each was kept, bool ``[...]``.
    """
    at = token.unsqueeze(-1)
    was, now = old.gather(-1, at).squeeze(-1), new.gather(-1, at).squeeze(-1)
    chance = torch.rand(token.shape, generator=generator, device=token.device)
    kept = chance * was < now
    rest = (new - old).clamp_(min=0)
    # Where both are the same but for rounding nothing is left; such a token is kept, or as good.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, new)
    return torch.where(kept, token, draw(rest, generator)), kept
