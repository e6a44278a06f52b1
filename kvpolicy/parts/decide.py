"""When it is decided."""

from __future__ import annotations

from pydantic import Field

from kvpolicy.layout import TokenLayout
from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Decide, EachToken
from kvpolicy.policy.view import CacheView

__all__ = ["EachLine", "EachToken", "Every"]

register_part("token")(EachToken)


@register_part("line")
class EachLine(Decide):
    """Decide where a line begins, for the whole line."""

    @property
    def interval(self) -> int:
        """The layout says."""
        return 0

    def wanted(self, layout: TokenLayout, column: int) -> int:
        """A line where one begins."""
        return layout.line_length if column == 0 else 1

    def headroom(self, view: CacheView) -> int:
        """A line where one begins."""
        return view.layout.line_length if view.layout.is_line_start(view.seen) else 1


@register_part("every")
class Every(Decide):
    """Decide when there is no room left, for some tokens at once."""

    tokens: int = Field(8, ge=1, description="tokens between decisions")

    @property
    def interval(self) -> int:
        """Those tokens."""
        return self.tokens

    def wanted(self, layout: TokenLayout, column: int) -> int:
        """Those tokens."""
        return self.tokens

    def headroom(self, view: CacheView) -> int:
        """Room for them, once there is none left."""
        return self.tokens if view.room == 0 else 1
