"""What is watched."""

from __future__ import annotations

from pydantic import Field

from kvpolicy.observers import CumulativeMass, FadingMass, LastQuery, LineMass, WindowMass
from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Observe
from kvpolicy.slots import SlotShape

__all__ = ["WatchAll", "WatchFading", "WatchLine", "WatchNewest", "WatchWindow"]


@register_part("cumulative_mass")
class WatchAll(Observe):
    """Mass from every query so far."""

    def observer(self, shape: SlotShape) -> CumulativeMass:
        """Of one layer."""
        return CumulativeMass(shape)


@register_part("line_mass")
class WatchLine(Observe):
    """Mass from the queries of the current line, or, between lines, of the line just finished."""

    def observer(self, shape: SlotShape) -> LineMass:
        """Of one layer."""
        return LineMass(shape)


@register_part("last_query")
class WatchNewest(Observe):
    """Mass from the newest query alone."""

    def observer(self, shape: SlotShape) -> LastQuery:
        """Of one layer."""
        return LastQuery(shape)


@register_part("window_mass")
class WatchWindow(Observe):
    """Mass from the last queries before a decision."""

    queries: int = Field(8, ge=1, description="last queries before a decision")

    @property
    def window(self) -> int:
        """Those queries."""
        return self.queries

    def observer(self, shape: SlotShape) -> WindowMass:
        """Of one layer."""
        return WindowMass(shape, self.queries)


@register_part("fading_mass")
class WatchFading(Observe):
    """Mass from every query so far, the older the less."""

    half_life: float = Field(28.0, gt=0, le=1e6, description="queries until a mass counts half")

    def observer(self, shape: SlotShape) -> FadingMass:
        """Of one layer."""
        return FadingMass(shape, self.half_life)
