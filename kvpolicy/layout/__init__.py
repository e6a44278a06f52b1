"""Where a token sits: positions, rows and columns, in raster order or any other."""

from kvpolicy.layout.groups import group_sizes
from kvpolicy.layout.lines import (
    AfterPrompt,
    LateLayout,
    RasterLayout,
    SequenceLayout,
    TextLayout,
    TokenLayout,
)
from kvpolicy.layout.locality import locality_aware_order
from kvpolicy.layout.ordered import (
    OrderedLayout,
    first_of_line,
    in_raster_order,
    largest_group,
    refuse_other_orders,
)

__all__ = [
    "AfterPrompt",
    "LateLayout",
    "OrderedLayout",
    "RasterLayout",
    "SequenceLayout",
    "TextLayout",
    "TokenLayout",
    "first_of_line",
    "group_sizes",
    "in_raster_order",
    "largest_group",
    "locality_aware_order",
    "refuse_other_orders",
]
