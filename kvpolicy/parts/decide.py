"""When it is decided, and for how many tokens: how many slots must be free before the next one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvpolicy.layout import refuse_other_orders
from kvpolicy.parts.named import register_part
from kvpolicy.policy.view import CacheView

__all__ = ["Parts", "each_line", "each_part", "each_token", "every"]


@register_part("decide", "token")
def each_token(view: CacheView) -> int:
    """Decide before every token, for one token: 1."""
    return 1


@register_part("decide", "line")
def each_line(view: CacheView) -> int:
    """Decide where a line begins, for the whole line: its length there, 1 within it.

    Raises:
        LayoutError: tokens don't come line by line.
    """
    refuse_other_orders(view.layout, "deciding line by line")
    return view.layout.line_length if view.layout.is_line_start(view.seen) else 1


Parts = Annotated[int, Field(ge=1, le=1000, description="parts of a line")]


@register_part("decide", "parts")
def each_part(view: CacheView, parts: Parts = 6) -> int:
    """Decide where a part of a line begins, for that part: what is left of it.

    Raises:
        LayoutError: tokens don't come line by line.
    """
    refuse_other_orders(view.layout, "deciding part of a line by part of a line")
    line = view.layout.line_length
    size, column = -(-line // parts), view.layout.column(view.seen)
    return min(size - column % size, line - column)


@register_part("decide", "every")
def every(
    view: CacheView, tokens: Annotated[int, Field(ge=1, description="between decisions")] = 8
) -> int:
    """Decide when there is no room left, for some tokens at once: as many, or 1 while there is."""
    return tokens if view.room == 0 else 1
