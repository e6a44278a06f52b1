"""OrderedLayout: an image whose tokens come in another order than raster, in groups."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from kvpolicy.errors import LayoutError, ShapeError
from kvpolicy.layout.groups import coarse_passes, group_sizes, split_groups
from kvpolicy.layout.lines import (
    Position,
    RasterLayout,
    SequenceLayout,
    Size,
    TextLayout,
    TokenLayout,
    _Layout,
)
from kvpolicy.layout.locality import locality_aware_order

__all__ = [
    "OrderedLayout",
    "first_of_line",
    "in_raster_order",
    "largest_group",
    "refuse_other_orders",
]


def _whole_numbers(value: Any) -> Any:
    """A tuple of an array, a tensor or a list; what is none of these is pydantic's to refuse."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


WholeNumbers = BeforeValidator(_whole_numbers)

#: Numbers that are printed in full.
_SHOWN = 64


class _Shortened(tuple[int, ...]):
    """Numbers, printed by the first and the last few."""

    def __repr__(self) -> str:
        first, last = (", ".join(map(str, part)) for part in (self[:4], self[-4:]))
        return f"({first}, ... {len(self) - 8} more ..., {last})"


class OrderedLayout(_Layout):
    """An image whose tokens come in any order, in groups of any size.

    A position is still a token's place in the sequence: prefixes, budgets and what is recent are
    counted by arrival. Lines and columns are those of the grid, so that distance is distance in the
    image. In raster order it answers as its grid does, bit for bit.

    Example:
        >>> grid = RasterLayout(rows=2, cols=2, prefix=1)
        >>> layout = OrderedLayout(grid=grid, order=(3, 0, 1, 2), groups=(1, 3))
        >>> layout.line(1), layout.column(1), layout.line(2), layout.column(2)
        (1, 1, 0, 0)
        >>> layout.group(3)
        range(2, 5)

    Args:
        grid: the image, with its prefix and suffix, which keep their places.
        order: of each token of the image as it comes, its raster index ``row * line_length +
            column``; line-break tokens count as a column.
        groups: how many tokens come at once, group after group; one by one by default.

    Raises:
        ParameterError: a field is missing, unknown or of the wrong type.
        LayoutError: the order is no permutation of the grid, or the groups don't add up to it.
    """

    grid: RasterLayout
    order: Annotated[tuple[Annotated[int, Field(ge=0)], ...], WholeNumbers]
    groups: Annotated[tuple[Size, ...], WholeNumbers] = ()

    def __init__(self, /, **fields: Any) -> None:
        if "groups" not in fields and hasattr(fields.get("order"), "__len__"):
            fields["groups"] = (1,) * len(fields["order"])
        super().__init__(**fields)
        size = self.grid.rows * self.grid.line_length
        if sorted(self.order) != list(range(size)):
            raise LayoutError(
                f"OrderedLayout: order must name each of the {size} places of {self.grid!r} once, "
                f"as raster indices 0 to {size - 1}; {self._wrong_places(size)}"
            )
        if sum(self.groups) != size:
            raise LayoutError(
                f"OrderedLayout: groups add up to {sum(self.groups)} tokens, and the image has "
                f"{size}; kvpolicy.group_sizes({size}, passes) gives sizes that fit"
            )

    @classmethod
    def locality_aware(
        cls,
        grid: RasterLayout,
        passes: int,
        *,
        repulsion: int = 1,
        proximity: float = 1.0,
        seed: int = 0,
    ) -> OrderedLayout:
        """The order and the groups of locality-aware parallel decoding (arXiv:2507.01957).

        Where so many passes would begin with three groups of one token or more, the order is that
        of the most passes that don't, and its groups are split: an order that begins one by one
        grows from a single place, and such images are worse (docs/parallel.md has the figures).

        Args:
            grid: the image.
            passes: groups in which it comes.
            repulsion: see :func:`kvpolicy.locality_aware_order`.
            proximity: likewise.
            seed: of the order.

        Raises:
            ParameterError: passes are fewer than 1 or more than the image has tokens.
        """
        size = grid.rows * grid.line_length
        groups = group_sizes(size, passes)
        if (coarse := coarse_passes(size, passes)) < passes:
            groups = group_sizes(size, coarse)
        order = locality_aware_order(
            grid.rows,
            grid.line_length,
            groups,
            repulsion=repulsion,
            proximity=proximity,
            seed=seed,
        )
        return cls(grid=grid, order=order, groups=split_groups(groups, passes))

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """A long order or many groups are shortened, as messages name layouts."""
        yield "grid", self.grid
        for name, numbers in (("order", self.order), ("groups", self.groups)):
            yield name, numbers if len(numbers) <= _SHOWN else _Shortened(numbers)

    @property
    def prefix(self) -> int:
        """Pinned tokens before the image."""
        return self.grid.prefix

    @property
    def line_length(self) -> int:
        """Tokens in a line of the grid."""
        return self.grid.line_length

    @property
    def length(self) -> int:
        """Tokens in a whole sequence: prefix, image and suffix."""
        return self.grid.length

    @property
    def compresses_prompt(self) -> bool:
        """As with the grid: an image's prompt is its prefix."""
        return self.grid.compresses_prompt

    @property
    def in_raster_order(self) -> bool:
        """Whether tokens come as they would on the grid alone, in whatever groups."""
        return self.order == tuple(range(len(self.order)))

    def line(self, position: Position) -> Position:
        """Row of the token that comes at a position; negative inside the prefix."""
        return self.grid.line(self.place(position))

    def column(self, position: Position) -> Position:
        """Column of the token that comes at a position; meaningless inside the prefix."""
        return self.grid.column(self.place(position))

    def is_line_start(self, position: int) -> bool:
        """Whether the token that comes at this position is the first of its row."""
        return self.grid.is_line_start(self.place(position))

    def place(self, position: Position) -> Position:
        """The position that the token would have in raster order; prefix and suffix stay."""
        return self._moved(self.order, self._order, position)

    def arrival(self, place: Position) -> Position:
        """The position at which the token of a raster position comes: the inverse of ``place``."""
        return self._moved(self._arrivals, self._arrived, place)

    def to_raster(self, tokens: Tensor) -> Tensor:
        """Tokens of whole sequences by arrival, ``[..., L]``, put in raster order.

        Raises:
            ShapeError: they are not ``length`` tokens.
        """
        if tokens.shape[-1] != self.length:
            raise ShapeError(
                f"to_raster takes the {self.length} tokens of a whole sequence, prefix included, "
                f"not {tokens.shape[-1]}"
            )
        return tokens[..., self.arrival(torch.arange(self.length, device=tokens.device))]

    def group(self, position: int) -> range:
        """Positions of the tokens that come with this one; outside the image it comes alone."""
        index = position - self.prefix
        if not 0 <= index < len(self.order):
            return range(position, position + 1)
        group = bisect_right(self._ends, index)
        end = self.prefix + self._ends[group]
        return range(end - self.groups[group], end)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Behind the last token of each group, counted from the image's first."""
        return tuple(accumulate(self.groups))

    @cached_property
    def _arrivals(self) -> tuple[int, ...]:
        """The inverse of the order."""
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    @cached_property
    def _order(self) -> dict[torch.device, Tensor]:
        """The order on each device where it has been asked for."""
        return {}

    @cached_property
    def _arrived(self) -> dict[torch.device, Tensor]:
        """Its inverse, likewise."""
        return {}

    def _moved(
        self, table: tuple[int, ...], tensors: dict[torch.device, Tensor], position: Position
    ) -> Position:
        """The table's entry for what lies inside the image; what lies outside stays."""
        first = self.prefix
        if not isinstance(position, Tensor):
            index = position - first
            return table[index] + first if 0 <= index < len(table) else position
        found = tensors.get(position.device)
        if found is None:
            found = tensors[position.device] = torch.tensor(table, device=position.device) + first
        inside = (position >= first) & (position < first + len(table))
        index = (position - first).clamp(0, len(table) - 1).long()
        return torch.where(inside, found[index].to(position.dtype), position)

    def _wrong_places(self, size: int) -> str:
        """What is wrong with the order, in words."""
        if outside := [place for place in self.order if place >= size]:
            return f"{outside[0]} is none"
        twice = [place for place in set(self.order) if self.order.count(place) > 1]
        if twice:
            return f"{min(twice)} comes {self.order.count(min(twice))} times"
        return f"{min(set(range(size)) - set(self.order))} is missing"


def in_raster_order(layout: TokenLayout) -> bool:
    """Whether a token's line and column follow from its position as on a page."""
    return not isinstance(layout, OrderedLayout) or layout.in_raster_order


def largest_group(layout: TokenLayout) -> int:
    """How many tokens come at once, at most: 1 where a layout has no groups."""
    return max(layout.groups) if isinstance(layout, OrderedLayout) else 1


def refuse_other_orders(layout: TokenLayout, who: str) -> None:
    """Refuse a layout whose tokens don't come line by line.

    Args:
        layout: where tokens sit.
        who: needs raster order; the subject of the message.

    Raises:
        LayoutError: they come in another order.
    """
    if not in_raster_order(layout):
        raise LayoutError(
            f"{who} needs tokens line by line, and this OrderedLayout has another order; use a "
            f"RasterLayout, or what works in any order, such as the policies near and h2o"
        )


def first_of_line(layout: TokenLayout, line: int, seen: int) -> int | None:
    """The first position, of -1 to ``seen``, that lies in a line or behind it.

    Position -1 stands for an empty slot, which lies in a line before all others.

    Args:
        layout: where tokens sit, in raster order.
        line: at most that of the token ``seen``.
        seen: the position of the token about to come.

    Returns:
        The position; None of a layout that is none of ours, whose lines may go up and down.
    """
    if type(layout) not in (RasterLayout, TextLayout, SequenceLayout, OrderedLayout):
        return None
    return bisect_left(range(-1, seen + 1), line, key=layout.line) - 1
