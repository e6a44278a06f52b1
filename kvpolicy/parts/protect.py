"""What may not go."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import PositiveSpan, Span
from kvpolicy.layout import first_of_line, refuse_other_orders
from kvpolicy.parts.named import register_part
from kvpolicy.policy.view import CacheView

__all__ = ["Share", "anchors", "recent_lines", "recent_share", "recent_tokens"]

Lines = Annotated[int, Field(ge=0, description="finished lines, beside the current one")]
Share = Annotated[float, Field(ge=0, le=1, description="share of the budget")]


@register_part("protect", "anchors")
def anchors(
    view: CacheView, count: Annotated[Span, Field(description="tokens, or lines")] = "1 line"
) -> Tensor:
    """The first tokens behind the prefix, ``index < count``: anchors of an image, sinks of a text.

    Returns:
        bool ``[B, H, S]``.
    """
    return view.first(count)


@register_part("protect", "lines")
def recent_lines(view: CacheView, count: Lines = 1) -> Tensor:
    """The current line, and the last finished ones: ``line(j) >= line(next token) - count``.

    Returns:
        bool ``[B, H, S]``.

    Raises:
        LayoutError: tokens don't come line by line.
    """
    refuse_other_orders(view.layout, "protecting recent lines")
    start = first_of_line(view.layout, view.line - count, view.seen)
    return view.lines >= view.line - count if start is None else view.since(start)


@register_part("protect", "window")
def recent_tokens(
    view: CacheView, count: Annotated[PositiveSpan, Field(description="tokens, or lines")] = 8
) -> Tensor:
    """The newest tokens: ``j >= seen - count``.

    Returns:
        bool ``[B, H, S]``.
    """
    return view.since(view.seen - view.tokens(count))


@register_part("protect", "share")
def recent_share(view: CacheView, share: Share = 0.5) -> Tensor:
    """The newest tokens, as a share of the budget; the token about to come is one of them.

    Returns:
        bool ``[B, H, S]``.
    """
    return view.since(view.seen - math.ceil(share * view.budget) + 1)
