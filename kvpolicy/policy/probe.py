"""What a policy says before the first token: asked on a view that has positions, and nothing else.

From what it protects and how much room it wants follows the smallest budget that works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor

from kvpolicy.errors import BudgetError, LayoutError, ParameterError
from kvpolicy.layout import (
    OrderedLayout,
    RasterLayout,
    SequenceLayout,
    TokenLayout,
    in_raster_order,
    largest_group,
)
from kvpolicy.observers import AttentionObserver, WindowMass
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape, SlotStore

__all__ = [
    "Unread",
    "far_line",
    "needs_raster_order",
    "probe_view",
    "refuse_long_window",
    "shortest_interval",
    "smallest_budget",
]

#: Rounds in which a budget that holds all that is protected must be found.
_ROUNDS = 10_000
#: An image in no order that lines have.
_SHUFFLED = OrderedLayout(grid=RasterLayout(rows=2, cols=2), order=(3, 0, 2, 1))
#: No budget is looked for beyond this; after so many rounds it is asked whether this one would do.
_VAST = 1 << 16
_DOUBTFUL = 100


class Unread(Exception):
    """A policy reads something of a probe's view that is not there; the message is what."""


class _Policy(Protocol):
    """What is asked of a policy here."""

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]: ...
    def headroom(self, view: CacheView) -> int: ...


class _Protects(_Policy, Protocol):
    """And of one that protects."""

    def protect(self, view: CacheView) -> Tensor | None: ...


class _NoTensors:
    """In place of a store: every position up to the newest, and no keys or values."""

    def __init__(self, seen: int) -> None:
        self.positions = torch.arange(seen, dtype=torch.int32).view(1, 1, -1)

    def __getattr__(self, name: str) -> NoReturn:
        raise Unread(name)


class _ProbeView(CacheView):
    """A view in which nothing has been observed."""

    @property
    def handed_out(self) -> int:
        """All slots hold a token."""
        return self.seen

    @property
    def mass(self) -> NoReturn:
        raise Unread("mass")

    def observer(self, kind: type[Any]) -> NoReturn:
        raise Unread(kind.__name__)


def probe_view(
    layout: TokenLayout, seen: int, budget: int, *, room: int = 0, tensors: bool = False
) -> CacheView:
    """A view just before the token ``seen``, of one head that still holds all tokens before it.

    Args:
        layout: where tokens sit.
        seen: tokens so far.
        budget: evictable tokens of the layer.
        room: slots that can be handed out without a decision.
        tensors: whether there are keys and values, all zero.

    Raises:
        Unread: by what the view has not, once it is read.
    """
    store: Any = _NoTensors(seen)
    if tensors:
        store.keys = store.values = torch.zeros(1, 1, seen, 4)
    return _ProbeView(
        cast(SlotStore, store),
        (),
        seen=seen,
        room=room,
        layer=0,
        num_layers=1,
        budget=budget,
        layout=layout,
        may_be_empty=False,
    )


def far_line(layout: TokenLayout, tokens: int) -> int:
    """The first position of a line with at least so many evictable tokens before it."""
    pieces = layout.pieces if isinstance(layout, SequenceLayout) else ()
    start = pieces[-1][0] if pieces else layout.prefix
    lines = -(-tokens // layout.line_length)
    return start + lines * layout.line_length


def smallest_budget(policy: _Protects, layout: TokenLayout) -> int:
    """The smallest budget that holds all that is protected, and what a decision makes room for.

    Looked for where all of it can be cached at once: behind at least twice as many tokens, and at
    the end of a layout that has one, in every column; in an order of its own, before every token.
    Tokens that come in a group need their room together.

    Raises:
        ParameterError: it can't be told without tensors, or a window is observed that is longer
            than the time between two decisions.
        BudgetError: no budget is enough.
    """
    try:
        refuse_long_window(policy, layout)
        budget = largest_group(layout)
        for round_ in range(_ROUNDS):
            if budget > _VAST:
                break
            more = (needed for needed in _needed(policy, layout, budget) if needed > budget)
            needed = next(more, None)
            if needed is None:
                return budget
            budget = needed
            if round_ == _DOUBTFUL and max(_needed(policy, layout, _VAST)) > _VAST:
                break
    except Unread as what:
        raise ParameterError(
            f"protect() or headroom() of {policy!r} reads {what}, which is not there before the "
            f"first token: override min_budget(layout) to say what it protects and wants at most"
        ) from None
    raise BudgetError(f"no budget is enough: {policy!r} protects everything")


def _needed(policy: _Protects, layout: TokenLayout, budget: int) -> Iterator[int]:
    """What is protected and wanted at once with this budget, wherever a policy may be asked."""
    for seen in _asked_at(layout, budget):
        view = probe_view(layout, seen, budget)
        protected = policy.protect(view)
        kept = 0 if protected is None else _count(protected & ~view.pinned)
        yield kept + max(policy.headroom(view), _together(layout, seen))


def _together(layout: TokenLayout, seen: int) -> int:
    """Tokens that are written at once, the next one among them."""
    group = layout.group(seen) if isinstance(layout, OrderedLayout) else range(seen, seen + 1)
    return len(group) if group.start == seen else 1


def _asked_at(layout: TokenLayout, budget: int) -> Iterable[int]:
    """Tokens seen when what is protected, or wanted beside it, may be most."""
    if isinstance(layout, OrderedLayout) and not (
        in_raster_order(layout) and largest_group(layout) == 1
    ):
        # Which token is protected most of depends on the order: any of them may be.
        return reversed(range(layout.prefix + 1, layout.length))
    start = far_line(layout, max(2 * (budget + layout.line_length), layout.evictable or 0))
    # The last column first: there, most of a line is protected.
    return reversed(range(start, start + layout.line_length))


def _count(mask: Tensor) -> int:
    """Of the head that protects most."""
    return int(mask.sum(-1).max())


def needs_raster_order(policy: _Protects) -> bool:
    """Whether it refuses a layout in another order before the first token."""
    view = probe_view(_SHUFFLED, 3, 2)
    try:
        policy.observers(SlotShape(1, 1, 1, torch.device("cpu"), _SHUFFLED))
        policy.headroom(view)
        policy.protect(view)
    except LayoutError:
        return True
    except Exception:  # whatever it says of such a view, a cache will say it again
        return False
    return False


def shortest_interval(policy: _Policy, layout: TokenLayout) -> int:
    """The fewest tokens from one decision to the next, in the middle of a sequence."""
    first = seen = far_line(layout, 2 * layout.line_length)
    decided: list[int] = []
    room = 0
    while len(decided) < 3 or seen < first + 2 * layout.line_length:
        wanted = policy.headroom(probe_view(layout, seen, 1, room=room))
        if wanted > room:
            decided.append(seen)
            room = wanted
        room, seen = room - 1, seen + 1
    return min(later - earlier for earlier, later in pairwise(decided))


def refuse_long_window(policy: _Policy, layout: TokenLayout) -> None:
    """Refuse a window of queries that is longer than the time between two decisions.

    Raises:
        ParameterError: it is.
        Unread: ``headroom`` reads what is not there.
    """
    shape = SlotShape(1, 1, 1, torch.device("cpu"), layout)
    windows = [each.window for each in policy.observers(shape) if isinstance(each, WindowMass)]
    if not windows:
        return
    interval = shortest_interval(policy, layout)
    if max(windows) > interval:
        raise ParameterError(
            f"window={max(windows)} must be at most interval={interval}, the fewest tokens between "
            f"two decisions on {layout!r}: votes are collected between decisions"
        )
