"""Spans: how many tokens, counted in tokens or in lines, so that one default fits every layout."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, WithJsonSchema

from kvpolicy.layout import SequenceLayout, TokenLayout

__all__ = ["HalfLife", "PositiveSpan", "Span", "first_tokens", "lines_in", "tokens_of"]

_LINES = re.compile(r"(\d{1,9})\s*lines?")


def _read(value: Any, least: int) -> int | str:
    """One spelling: 28, or "2 lines"."""
    if isinstance(value, str) and (lines := lines_in(value)) is not None:
        value = f"{lines} line{'' if lines == 1 else 's'}"
        if lines >= least:
            return str(value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("give an integer for a number of tokens (28), or lines ('2 lines')")
    elif value >= least:
        return value
    raise ValueError(f"must be greater than or equal to {least}")


def _read_half_life(value: Any) -> float | str:
    """One spelling: 28.0, or "1 line"."""
    if isinstance(value, str):
        return str(_read(value, 1))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise ValueError("give a number of tokens above 0 and at most 1e6, or lines ('1 line')")
    return float(value)


def _schema(least: int) -> dict[str, Any]:
    """As JSON: an integer or text."""
    lines = {"type": "string", "pattern": r"^\d+ lines?$"}
    return {"anyOf": [{"type": "integer", "minimum": least}, lines]}


#: The type of a parameter that counts tokens, or lines of the layout: ``28``, ``"1 line"``.
Span: TypeAlias = Annotated[
    int | str, BeforeValidator(lambda value: _read(value, 0)), WithJsonSchema(_schema(0))
]

#: A span of at least one token or line.
PositiveSpan: TypeAlias = Annotated[
    int | str, BeforeValidator(lambda value: _read(value, 1)), WithJsonSchema(_schema(1))
]

#: Tokens until something counts half: ``28.0``, ``0.5``, ``"1 line"``.
HalfLife: TypeAlias = Annotated[
    float | str,
    Field(description="queries until a mass counts half, or lines of queries"),
    BeforeValidator(_read_half_life),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1e6},
                _schema(1)["anyOf"][1],
            ]
        }
    ),
]


def lines_in(text: str) -> int | None:
    """How many lines a text counts: ``2 lines``, ``2lines``; None where it counts none."""
    found = _LINES.fullmatch(text.strip())
    return int(found[1]) if found else None


def tokens_of(span: int | str, layout: TokenLayout) -> int:
    """How many tokens a span is: as many as so many lines of the layout have.

    Example:
        >>> from kvpolicy import RasterLayout, TextLayout
        >>> tokens_of("2 lines", RasterLayout(rows=24, cols=24, line_break=1))
        50
        >>> tokens_of("2 lines", TextLayout()), tokens_of(28, TextLayout())
        (2, 28)
    """
    return span if isinstance(span, int) else int(span.split()[0]) * layout.line_length


def first_tokens(span: int | str, layout: TokenLayout) -> int:
    """How many tokens behind the prefix a span is: lines are as long as the layout's first.

    That of a sequence of pieces does not change as further pieces come.
    """
    if isinstance(span, int) or not isinstance(layout, SequenceLayout):
        return tokens_of(span, layout)
    return int(span.split()[0]) * layout.pieces[0][1]
