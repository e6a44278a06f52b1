"""The only door between a model and a policy: what attention did, slot by slot.

``A[q, j]`` is the attention probability that query token ``q`` gives key token ``j``, averaged
over the query heads that share the KV head. Mass is a sum of ``A[q, j]`` over queries; float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import HalfLife, tokens_of
from kvpolicy.errors import ParameterError
from kvpolicy.layout import TokenLayout, refuse_other_orders
from kvpolicy.ops.sums import sum_over
from kvpolicy.slots import SlotShape

__all__ = [
    "AttentionObserver",
    "AttentionReport",
    "CumulativeMass",
    "FadingMass",
    "LastQuery",
    "LineMass",
    "Need",
    "WindowMass",
]

#: A number of queries.
Window = Annotated[int, Field(ge=1, description="last queries before a decision")]


class Need(IntEnum):
    """Whether an observer must see attention: where none must, the fused kernel serves."""

    NONE = 0
    MASS = 1


@dataclass(frozen=True)
class AttentionReport:
    """What one run of consecutive queries attended to.

    Attributes:
        mass: ``A[q, s]`` of each query and slot, ``[B, H, T, S']``, float32; slots from S' on
            have never been handed out and got nothing.
        first: position of the first of the T queries.
        room: slots that can still be handed out after the last of these queries before the
            policy must decide again; 0 says that the next token needs a decision.
        layout: where the tokens sit.
    """

    mass: Tensor
    first: int
    room: int
    layout: TokenLayout

    @property
    def count(self) -> int:
        """Number of queries T."""
        return self.mass.shape[2]


@runtime_checkable
class AttentionObserver(Protocol):
    """Watches one layer of one generation.

    Attributes:
        needs: whether it must see attention.
        mass: its reading, one float32 number a slot, ``[B, H, S]``. This is all the state that
            an observer keeps per slot: the cache re-indexes it when slots or batches are
            re-ordered.
    """

    needs: ClassVar[Need]
    mass: Tensor

    def observe(self, report: AttentionReport) -> None:
        """Take in what the newest queries attended to."""

    def forget(self, slots: Tensor) -> None:
        """These slots, ``[B, H, N]``, now hold other tokens."""


class _SlotMass:
    """One number a slot, zero for a token that has just come."""

    def __init__(self, shape: SlotShape) -> None:
        size = (shape.batch, shape.heads, shape.slots)
        self.mass = torch.zeros(size, dtype=torch.float32, device=shape.device)

    def forget(self, slots: Tensor) -> None:
        """Zero the reading of slots that now hold other tokens."""
        self.mass.scatter_(2, slots, 0.0)

    def _add(self, mass: Tensor) -> None:
        """Add the mass of T queries, ``[B, H, T, S']``."""
        count, slots = mass.shape[2:]
        into = self.mass if slots == self.mass.shape[2] else self.mass[..., :slots]
        into += mass.squeeze(2) if count == 1 else sum_over(mass, 2)

    def _begin(self, mass: Tensor) -> None:
        """The same, from zero."""
        count, slots = mass.shape[2:]
        if count > 1 or slots < self.mass.shape[2]:
            self.mass.zero_()
            self._add(mass)
        else:
            self.mass.copy_(mass.squeeze(2))


class CumulativeMass(_SlotMass):
    """Mass from every query so far: ``sum over q of A[q, j]`` (H2O, arXiv:2306.14048)."""

    needs: ClassVar[Need] = Need.MASS

    def observe(self, report: AttentionReport) -> None:
        """Add the queries' mass."""
        self._add(report.mass)


class FadingMass(_SlotMass):
    """Mass from every query so far, the older the less: ``sum over q of 2^(-age(q) / h) A[q, j]``.

    Args:
        shape: the store's shape.
        half_life: queries ``h`` until a mass counts half, or lines of queries; a line by default,
            which was 28 queries where it was tried.

    Raises:
        ParameterError: the half-life is not positive, or no number.
    """

    needs: ClassVar[Need] = Need.MASS

    def __init__(self, shape: SlotShape, half_life: HalfLife = "1 line") -> None:
        if isinstance(half_life, str):
            half_life = tokens_of(half_life, shape.layout)
        if not half_life > 0:
            raise ParameterError(f"FadingMass: half_life={half_life} must be positive")
        super().__init__(shape)
        self.keep = 0.5 ** (1 / half_life)

    def observe(self, report: AttentionReport) -> None:
        """Let the reading fade, and add the queries' mass."""
        mass, count = report.mass, report.count
        self.mass *= self.keep**count
        if count > 1:
            ages = torch.arange(count - 1, -1, -1, device=mass.device)
            mass = mass * (self.keep**ages).view(-1, 1)
        self._add(mass)


class LineMass(_SlotMass):
    """Mass from the queries of the current line, or, between lines, of the line just finished.

    Queries of the prefix, before the first line, count as one line (LineAR, arXiv:2512.04857).

    Raises:
        LayoutError: tokens don't come line by line.
    """

    needs: ClassVar[Need] = Need.MASS

    def __init__(self, shape: SlotShape) -> None:
        refuse_other_orders(shape.layout, "LineMass")
        super().__init__(shape)

    def observe(self, report: AttentionReport) -> None:
        """Add the queries' mass, starting from zero where a line begins."""
        mass = report.mass
        for query in reversed(range(mass.shape[2])):
            if report.layout.is_line_start(report.first + query):
                self._begin(mass[:, :, query:])
                return
        self._add(mass)


class LastQuery(_SlotMass):
    """Mass from the newest query alone: ``A[q, j]`` (TOVA, arXiv:2401.06104)."""

    needs: ClassVar[Need] = Need.MASS

    def observe(self, report: AttentionReport) -> None:
        """Replace the reading by the newest query's."""
        self.mass[..., : report.mass.shape[-1]] = report.mass[:, :, -1]


class WindowMass(_SlotMass):
    """Mass from the last ``window`` queries before a decision (SnapKV, arXiv:2404.14469).

    It starts from zero ``window`` tokens before each decision, so its reading is meaningful when
    a decision is due, and only then.

    Args:
        shape: the store's shape.
        window: number of queries; at most as many as there are tokens between two decisions.

    Raises:
        ParameterError: the window is smaller than one query.
    """

    needs: ClassVar[Need] = Need.MASS

    def __init__(self, shape: SlotShape, window: Window = 8) -> None:
        if window < 1:
            raise ParameterError(f"WindowMass: window={window} must be at least 1 query")
        super().__init__(shape)
        self.window = window

    def observe(self, report: AttentionReport) -> None:
        """Add the mass of those queries that lie in the window before the next decision."""
        # Query i of T leaves room for `report.room + T - 1 - i` tokens behind it.
        opening = report.room + report.count - self.window
        if opening >= report.count:
            return
        if opening >= 0:
            self._begin(report.mass[:, :, opening:])
        else:
            self._add(report.mass)
