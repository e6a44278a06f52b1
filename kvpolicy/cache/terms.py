"""Terms: what a model's attention adds to query times key, by position of the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import ParameterError, ShapeError

__all__ = ["Terms", "by_slot"]


@dataclass(frozen=True)
class Terms:
    """The terms of T queries' attention; see :func:`kvpolicy.ops.attend.attend`.

    Attributes:
        scale: factor of the scores.
        visible: bool by position, broadcastable to ``[B, H, T, seen + T]``.
        bias: by position, ``[B|1, 1|H|G * H, T, seen + T]``.
        softcap: bound of the scores.
        sinks: learned logits ``[G * H]``.
    """

    scale: float | None = None
    visible: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but a scale."""
        return (
            self.visible is None
            and self.bias is None
            and self.softcap is None
            and self.sinks is None
        )

    def rows(self, part: slice) -> Terms:
        """The terms of some of the queries."""
        if self.visible is None and self.bias is None:
            return self
        return replace(self, visible=_rows(self.visible, part), bias=_rows(self.bias, part))

    def places(self, part: slice) -> Terms:
        """The terms of some of the positions."""
        if self.visible is None and self.bias is None:
            return self
        visible = None if self.visible is None else self.visible[..., part]
        return replace(
            self, visible=visible, bias=None if self.bias is None else self.bias[..., part]
        )

    def scoring(self) -> Mapping[str, Any]:
        """What does not depend on where a key lies, as arguments of ``attend``."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}

    def check(self, batch: int, heads: int, query_heads: int, count: int, length: int) -> None:
        """Refuse terms that don't fit the tokens.

        Raises:
            ShapeError: a tensor has the wrong shape or dtype.
            ParameterError: the soft cap is no positive number.
        """
        if self.visible is not None and not (
            isinstance(self.visible, Tensor)
            and self.visible.dtype == torch.bool
            and _fits(self.visible, batch, (1, heads), count, length)
        ):
            raise ShapeError(
                f"visible is {_say(self.visible)}; expected bool [{batch}, 1, {count}, {length}]"
            )
        if self.bias is not None and not (
            isinstance(self.bias, Tensor)
            and self.bias.is_floating_point()
            and _fits(self.bias, batch, (1, heads, query_heads), count, length)
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


def by_slot(term: Tensor, positions: Tensor) -> Tensor:
    """Look each slot's position up: ``[B|1, N, T, P]`` by position to ``[B, N', T, S]``.

    Positions are ``[B, H, S]``; N is 1, H, or a multiple G * H; N' is H or G * H. Empty slots get
    what position 0 has.
    """
    batch, heads, slots = positions.shape
    rows = term.shape[2]
    index = positions.clamp(min=0).to(torch.int64).unsqueeze(2)
    if term.shape[1] > heads:
        index = index.repeat_interleave(term.shape[1] // heads, dim=1)
    index = index.expand(batch, index.shape[1], rows, slots)
    return term.expand(batch, index.shape[1], rows, term.shape[3]).gather(3, index)


def _rows(term: Tensor | None, part: slice) -> Tensor | None:
    return term if term is None or term.shape[2] == 1 else term[:, :, part]


def _fits(term: Tensor, batch: int, heads: tuple[int, ...], count: int, length: int) -> bool:
    return (
        term.ndim == 4
        and term.shape[0] in (1, batch)
        and term.shape[1] in heads
        and term.shape[2] in (1, count)
        and term.shape[3] == length
    )


def _say(given: object) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
