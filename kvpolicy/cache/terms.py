"""Terms: what a model's attention adds to query times key, by position of the key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import ParameterError, ShapeError

__all__ = ["Terms"]


class Terms(NamedTuple):
    """The terms of T queries' attention; see :func:`kvpolicy.attend`.

    Attributes:
        scale: factor of the scores.
        visible: bool by position, ``[B|1, 1|H, T, seen + T]``: the whole mask; None for a causal
            one.
        bias: by position, ``[B|1, 1|H|G * H, T, seen + T]``.
        softcap: bound of the scores.
        sinks: learned logits ``[G * H]``.
    """

    scale: float | None = None
    visible: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def rows(self, part: slice) -> Terms:
        """The terms of some of the queries."""
        return self._replace(visible=_rows(self.visible, part), bias=_rows(self.bias, part))

    def columns(self, end: int) -> Terms:
        """The terms by position, up to position ``end``."""
        visible, bias = (None if t is None else t[..., :end] for t in (self.visible, self.bias))
        return self._replace(visible=visible, bias=bias)

    def check(self, key: Tensor, query_heads: int, seen: int) -> None:
        """Refuse terms that don't fit the new tokens, whose keys are ``[B, H, T, D]``.

        Raises:
            ShapeError: a tensor has the wrong shape or dtype.
            ParameterError: the soft cap is no positive number.
        """
        batch, heads, count, _ = key.shape
        length = seen + count
        if self.visible is not None and not (
            isinstance(self.visible, Tensor)
            and self.visible.dtype == torch.bool
            and _fits(self.visible, batch, (1, heads), (count,), length)
        ):
            raise ShapeError(
                f"visible is {_say(self.visible)}; expected bool [{batch}, 1, {count}, {length}], "
                f"which says for each new token what it sees, causality included"
            )
        if self.bias is not None and not (
            isinstance(self.bias, Tensor)
            and self.bias.is_floating_point()
            and _fits(self.bias, batch, (1, heads, query_heads), (1, count), length)
        ):
            raise ShapeError(
                f"bias is {_say(self.bias)}; expected floating point "
                f"[{batch}, {query_heads}, {count}, {length}]"
            )
        if self.sinks is not None and not (
            isinstance(self.sinks, Tensor) and tuple(self.sinks.shape) == (query_heads,)
        ):
            raise ShapeError(f"sinks is {_say(self.sinks)}; expected [{query_heads}]")
        if self.softcap is not None and not self.softcap > 0:
            raise ParameterError(f"softcap={self.softcap!r} must be a positive number, or None")


def _rows(term: Tensor | None, part: slice) -> Tensor | None:
    return term if term is None or term.shape[2] == 1 else term[:, :, part]


def _fits(
    term: Tensor, batch: int, heads: tuple[int, ...], rows: tuple[int, ...], length: int
) -> bool:
    return (
        term.ndim == 4
        and term.shape[0] in (1, batch)
        and term.shape[1] in heads
        and term.shape[2] in rows
        and term.shape[3] == length
    )


def _say(given: object) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
