"""Sequences cut into lines: text, raster images, and layouts that are known late.

A layout is pure arithmetic. Every method takes a position (a token's 0-based index in the
sequence, prefix included) as an ``int`` or as an integer tensor of any shape, and answers in kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kvpolicy.errors import LayoutError, parameter_error

__all__ = [
    "AfterPrompt",
    "LateLayout",
    "RasterLayout",
    "SequenceLayout",
    "TextLayout",
    "TokenLayout",
]

Position = TypeVar("Position", int, Tensor)


@runtime_checkable
class TokenLayout(Protocol):
    """What a policy may ask about a sequence.

    Attributes:
        prefix: number of leading tokens that are pinned: never evicted, outside the budget.
        length: number of tokens of a whole sequence, prefix included, or None where unknown.
        line_length: number of tokens of a line, its line-break token included.
        evictable: number of tokens behind the prefix, or None where the length is unknown.
        compresses_prompt: whether a first call longer than the capacity attends in full and is
            compressed afterwards.
    """

    @property
    def prefix(self) -> int:
        """Pinned leading tokens."""

    @property
    def length(self) -> int | None:
        """Tokens of a whole sequence, or None."""

    @property
    def line_length(self) -> int:
        """Tokens of a line."""

    @property
    def evictable(self) -> int | None:
        """Tokens behind the prefix, or None where the length is unknown."""

    @property
    def compresses_prompt(self) -> bool:
        """Whether a first call longer than the capacity attends in full, then is compressed."""

    def line(self, position: Position) -> Position:
        """Line of a position; negative inside the prefix."""

    def column(self, position: Position) -> Position:
        """Column of a position."""

    def is_line_start(self, position: int) -> bool:
        """Whether the token at a position opens a line."""

    def is_pinned(self, position: Tensor) -> Tensor:
        """Whether tokens belong to the prefix."""


class _Grid(Protocol):
    """What the arithmetic of lines needs."""

    @property
    def prefix(self) -> int: ...
    @property
    def length(self) -> int | None: ...
    @property
    def line_length(self) -> int: ...


class _Layout(BaseModel):
    """What the two layouts share: lines of equal length behind a pinned prefix."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, /, **fields: object) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise parameter_error(type(self).__name__, type(self), error) from None

    @property
    def evictable(self: _Grid) -> int | None:
        """Number of tokens behind the prefix, or None where the length is unknown."""
        return None if self.length is None else self.length - self.prefix

    def line(self: _Grid, position: Position) -> Position:
        """Line of a position: 0 is the first line behind the prefix; prefix lines are negative."""
        return (position - self.prefix) // self.line_length

    def column(self: _Grid, position: Position) -> Position:
        """Column of a position, 0 to ``line_length - 1``; meaningless inside the prefix."""
        return (position - self.prefix) % self.line_length

    def is_line_start(self: _Grid, position: int) -> bool:
        """Whether the token at this position opens a line."""
        return position >= self.prefix and (position - self.prefix) % self.line_length == 0

    def is_pinned(self: _Grid, position: Tensor) -> Tensor:
        """Whether tokens belong to the prefix; bool of the same shape (empty slots are not)."""
        return (position >= 0) & (position < self.prefix)


Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class RasterLayout(_Layout):
    """An image drawn line by line behind a prefix, with optional tokens after it.

    Tokens after the image (``suffix``) go on as further lines, so that every policy treats them
    like the rows of a taller image.

    Example:
        >>> layout = RasterLayout(rows=28, cols=28, prefix=1)
        >>> layout.length, layout.line(29), layout.column(30)
        (785, 1, 1)

    Args:
        rows: image rows, in tokens.
        cols: image columns, in tokens, without the line-break token.
        line_break: 1 where the model ends each row with a line-break token, else 0.
        prefix: pinned tokens before the image (class token, prompt).
        suffix: tokens that may follow the image.

    Raises:
        ParameterError: a field is missing, unknown, of the wrong type or out of range.
    """

    rows: Size
    cols: Size
    line_break: Annotated[int, Field(ge=0, le=1)] = 0
    prefix: Count = 0
    suffix: Count = 0

    @property
    def line_length(self) -> int:
        """Tokens in a line, its line-break token included."""
        return self.cols + self.line_break

    @property
    def length(self) -> int:
        """Tokens in a whole sequence: prefix, image and suffix."""
        return self.prefix + self.rows * self.line_length + self.suffix

    @property
    def compresses_prompt(self) -> bool:
        """An image's prompt is its prefix, which is pinned: there is nothing to compress."""
        return False


class TextLayout(_Layout):
    """Text: pinned sinks, then tokens without a known end.

    Args:
        sinks: leading tokens that are pinned (attention sinks, a system prompt).
        length: longest sequence that will be cached, where known. Fractional budgets need it.
        line_length: tokens that line-wise policies treat as one line.

    Raises:
        ParameterError: a field is unknown, of the wrong type or out of range.
        LayoutError: the length leaves nothing behind the sinks.
    """

    sinks: Count = 0
    length: Size | None = None
    line_length: Size = 1

    def __init__(self, /, **fields: object) -> None:
        super().__init__(**fields)
        if self.length is not None and self.length <= self.sinks:
            raise LayoutError(
                f"TextLayout: length={self.length} leaves no token behind sinks={self.sinks}; "
                f"the smallest length that works is {self.sinks + 1}"
            )

    @property
    def prefix(self) -> int:
        """Pinned tokens: the sinks."""
        return self.sinks

    @property
    def compresses_prompt(self) -> bool:
        """A text prompt attends in full and is compressed to the budget afterwards."""
        return True


class SequenceLayout(_Layout):
    """Text and images in one sequence: a pinned prefix, then pieces, the last without an end.

    A piece is cut into lines of its own length, and opens a line wherever it begins; the line
    before it may therefore be short. Text behind the prefix is cut into lines too, so that every
    policy treats it like rows of an image: nothing behind the prefix is pinned, because the slots
    of pinned tokens are counted when the cache is allocated and can't grow with a conversation.

    Example:
        >>> layout = SequenceLayout(prefix=3, pieces=((3, 5), (20, 5), (26, 4)))
        >>> layout.line(19), layout.line(20), layout.line(26), layout.column(26)
        (3, 4, 6, 0)

    Args:
        prefix: pinned tokens before the first piece.
        pieces: of each piece, the position of its first token and the tokens in one of its lines;
            the first piece begins where the prefix ends.

    Raises:
        ParameterError: a field is missing, unknown, of the wrong type or out of range.
        LayoutError: the pieces don't follow each other.
    """

    prefix: Count
    pieces: Annotated[tuple[tuple[Count, Size], ...], Field(min_length=1)]

    def __init__(self, /, **fields: object) -> None:
        super().__init__(**fields)
        starts = [start for start, _ in self.pieces]
        if starts[0] != self.prefix or any(b <= a for a, b in pairwise(starts)):
            raise LayoutError(
                f"SequenceLayout: pieces={self.pieces} must begin at prefix={self.prefix}, and "
                f"each must begin behind the one before"
            )

    @property
    def line_length(self) -> int:
        """Tokens in a line of the last piece, which is the one that tokens come to."""
        return self.pieces[-1][1]

    @property
    def length(self) -> None:
        """Unknown: the sequence may go on."""
        return None

    @property
    def compresses_prompt(self) -> bool:
        """The prompt of a picture is its prefix, which is pinned: there is nothing to compress."""
        return False

    def line(self, position: Position) -> Position:
        """Line of a position, counted on from piece to piece; prefix lines are negative."""
        start, length = self.pieces[0]
        line = (position - start) // length
        lines = 0
        for (before, width), (start, length) in pairwise(self.pieces):
            lines += -(-(start - before) // width)
            line = _from(start, position, (position - start) // length + lines, line)
        return line

    def column(self, position: Position) -> Position:
        """Column of a position in its line; meaningless inside the prefix."""
        start, length = self.pieces[0]
        column = (position - start) % length
        for start, length in self.pieces[1:]:
            column = _from(start, position, (position - start) % length, column)
        return column

    def is_line_start(self, position: int) -> bool:
        """Whether the token at this position opens a line."""
        return position >= self.prefix and self.column(position) == 0


def _from(start: int, position: Position, here: Position, before: Position) -> Position:
    """``here`` where the position has reached ``start``, else ``before``."""
    if isinstance(position, Tensor):
        return torch.where(position >= start, here, before)
    return here if position >= start else before


@runtime_checkable
class LateLayout(Protocol):
    """A layout that is known only once the first tokens of a sequence are out.

    The cache asks before each call. As long as the answer is None, every token so far is prefix:
    all are kept, and no budget is in force. The first layout that comes fixes the prefix, the
    budget and the slots, which are allocated then. Later answers may say how the sequence goes on
    behind that layout's end; they keep its prefix, and the budget stays as it is.

    Attributes:
        goes_on: whether there may be such later answers. A budget given in tokens is then not cut
            down to the first layout's length.
    """

    @property
    def goes_on(self) -> bool:
        """Whether the sequence may go on behind the layout that is known first."""

    def preview(self) -> TokenLayout | None:
        """What is known before the first token, to check budgets against; None for nothing."""

    def at(self, seen: int, count: int, bound: TokenLayout | None) -> TokenLayout | None:
        """The layout, if it is known before the tokens ``seen`` to ``seen + count - 1`` are cached.

        Args:
            seen: tokens that are cached.
            count: tokens that are about to come, at least 1.
            bound: the layout so far; None where there was none.

        Returns:
            The layout from now on (``bound`` itself where nothing changes), or None.
        """


@dataclass(frozen=True)
class AfterPrompt:
    """An image behind a prompt of any length: the tokens of the first call are its prefix.

    Example:
        >>> AfterPrompt(RasterLayout(rows=24, cols=24)).at(0, 17, None)
        RasterLayout(rows=24, cols=24, line_break=0, prefix=17, suffix=0)

    Args:
        grid: the image, and the tokens around it that are not part of the first call.
    """

    grid: RasterLayout
    goes_on: ClassVar[bool] = False

    def preview(self) -> RasterLayout:
        """The image without its prompt."""
        return self.grid

    def at(self, seen: int, count: int, bound: TokenLayout | None) -> TokenLayout:
        """The image behind the first call's tokens."""
        if bound is not None:
            return bound
        return self.grid.model_copy(update={"prefix": self.grid.prefix + seen + count})
