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
    "PlacedObserver",
    "RollingMass",
    "WindowMass",
    "like_state",
    "replace_state",
    "state_of",
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
            an observer keeps per slot, unless ``per_slot`` names another attribute that is,
            ``[B, H, ..., S]``: the cache re-indexes it when slots or batches are re-ordered.
    """

    needs: ClassVar[Need]

    @property
    def mass(self) -> Tensor:
        """Its reading, ``[B, H, S]``, float32."""

    def observe(self, report: AttentionReport) -> None:
        """Take in what the newest queries attended to."""

    def forget(self, slots: Tensor) -> None:
        """These slots, ``[B, H, N]``, now hold other tokens."""


@runtime_checkable
class PlacedObserver(AttentionObserver, Protocol):
    """An observer whose reading hangs on where the tokens lie, too."""

    def mass_at(self, layout: TokenLayout, positions: Tensor, seen: int) -> Tensor:
        """Its reading before a token comes, ``[B, H, S]``: see :meth:`RollingMass.mass_at`."""


def state_of(observer: AttentionObserver) -> Tensor:
    """All that an observer keeps per slot, ``[B, H, ..., S]``."""
    state: Tensor = getattr(observer, _name_of_state(observer))
    return state


def replace_state(observer: AttentionObserver, state: Tensor) -> None:
    """Put what an observer keeps per slot in the place of what it kept."""
    setattr(observer, _name_of_state(observer), state)


def like_state(slots: Tensor, state: Tensor) -> Tensor:
    """Slots ``[B, H, N]`` as an index into a state's last dimension, ``[B, H, ..., N]``."""
    if state.ndim == slots.ndim:
        return slots
    between = state.shape[2:-1]
    return slots.view(*slots.shape[:2], *[1] * len(between), -1).expand(-1, -1, *between, -1)


def _name_of_state(observer: AttentionObserver) -> str:
    return getattr(observer, "per_slot", "mass")


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


class RollingMass:
    """Mass from a line's worth of queries, wherever in a line that is.

    Between lines it is what :class:`LineMass` reads. Within a line it is the mass from the line so
    far, and for tokens in the columns to come also that from the line before, for want of newer:
    what the line before looked at behind that column has been drawn over. So a decision in the
    middle of a line sees nobody favoured that lies where the line has passed.

    Queries of the prefix count as one line, before the first.

    Attributes:
        of_lines: mass from the current line (or between lines the finished one), and from the one
            before it, ``[B, H, 2, S]``, float32.

    Raises:
        LayoutError: tokens don't come line by line.
    """

    needs: ClassVar[Need] = Need.MASS
    per_slot: ClassVar[str] = "of_lines"

    def __init__(self, shape: SlotShape) -> None:
        refuse_other_orders(shape.layout, "RollingMass")
        size = (shape.batch, shape.heads, 2, shape.slots)
        self.of_lines = torch.zeros(size, dtype=torch.float32, device=shape.device)

    @property
    def mass(self) -> Tensor:
        """Mass from the current line, ``[B, H, S]``; :meth:`mass_at` has the rest."""
        return self.of_lines[:, :, 0]

    def mass_at(self, layout: TokenLayout, positions: Tensor, seen: int) -> Tensor:
        """The reading, ``[B, H, S]``.

        Args:
            layout: where tokens sit.
            positions: of the tokens in the first S slots, ``[B, H, S]``.
            seen: position of the token about to come.
        """
        now, before = self.of_lines[..., : positions.shape[-1]].unbind(2)
        column = layout.column(seen)
        if column == 0 or seen < layout.prefix:
            return now
        # The prefix lies in no column: of what the line before gave it, the share still to come.
        left = 1 - column / layout.line_length
        to_come = (layout.column(positions) >= column).to(now.dtype)
        return torch.addcmul(now, before, to_come.masked_fill_(positions < layout.prefix, left))

    def forget(self, slots: Tensor) -> None:
        """Zero the reading of slots that now hold other tokens."""
        self.of_lines.scatter_(3, like_state(slots, self.of_lines), 0.0)

    def observe(self, report: AttentionReport) -> None:
        """Add the queries' mass to their line."""
        start, count = 0, report.count
        for query in range(count):
            if report.layout.is_line_start(report.first + query):
                self._add(report.mass[:, :, start:query])
                self.of_lines[:, :, 1] = self.of_lines[:, :, 0]
                self.of_lines[:, :, 0] = 0.0
                start = query
        self._add(report.mass[:, :, start:])

    def _add(self, mass: Tensor) -> None:
        """Add the mass of T queries to the current line's, ``[B, H, T, S']``."""
        if count := mass.shape[2]:
            into = self.of_lines[:, :, 0, : mass.shape[-1]]
            into += mass.squeeze(2) if count == 1 else sum_over(mass, 2)


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
