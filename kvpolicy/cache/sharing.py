"""Sharing: how the layers of a cache share its budget, and which of them need no policy."""

from __future__ import annotations

from collections.abc import Sequence

from kvpolicy.budget.budget import Budget, Schedule
from kvpolicy.cache.decider import MOST_POSITIONS
from kvpolicy.errors import BudgetError, LayoutError, ParameterError
from kvpolicy.layout import LateLayout, TokenLayout, largest_group
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import check_order

__all__ = ["Sharing"]


class Sharing:
    """The budget of each layer of a cache.

    Args:
        policy: who decides.
        budget: evictable tokens a layer, on average; None for as many as the layout has.
        schedule: how layers share them.
        layout: where tokens sit, or who will say so.
        num_layers: layers of the model.
        windows: of each layer, how many tokens its queries can see; see :class:`PolicyCache`.

    Attributes:
        known: where tokens sit; None while that is unknown.
        late: who will say so, and whether it goes on; None where nothing is left to say.
        left_alone: layers that can see no more than the budget, and so need no policy.
        managed: the others, lowest first.

    Raises:
        BudgetError: the budget is too small for this policy on this layout.
        LayoutError: the layout has more tokens than positions can count.
        ParameterError: there is not one window a layer.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        budget: Budget | None,
        schedule: Schedule,
        layout: TokenLayout | LateLayout,
        num_layers: int,
        windows: Sequence[int | None] | None,
    ) -> None:
        self.policy, self.schedule = policy, schedule
        self._budget = budget
        self.late: LateLayout | None = None
        self.known: TokenLayout | None
        if isinstance(layout, TokenLayout):
            self.known = layout
        else:
            self.late, self.known = layout, layout.preview()
        self.windows = _checked(windows, num_layers)
        average = None if self.known is None else self._average(self.known)
        # Where the layout is not known yet, the budget may not be either: windows stay with us.
        reach = 0 if self.known is None or average is None else self.known.prefix + average
        self.left_alone = frozenset(
            layer
            for layer, window in enumerate(self.windows)
            if window is not None and window <= reach
        )
        self.managed = tuple(n for n in range(num_layers) if n not in self.left_alone)

    def budgets(self, layout: TokenLayout) -> dict[int, int]:
        """The budget of each layer that the policy manages.

        Raises:
            BudgetError: the budget is too small for this policy on this layout.
            LayoutError: the layout has more tokens than positions can count.
        """
        average = self._average(layout)
        if not self.managed:
            return {}
        self.schedule.check(layout)
        budget = self._budget
        open_end = self._goes_on and budget is not None and budget.kind != "fraction"
        shared = self.schedule.layers(
            average,
            len(self.managed),
            floor=self._floor(layout),
            ceiling=None if open_end else layout.evictable,
        )
        return dict(zip(self.managed, shared, strict=True))

    def bind(
        self, layer: int, seen: int, count: int, bound: TokenLayout | None, budget: int
    ) -> tuple[TokenLayout, int] | None:
        """The layout that a layer has from now on, and its budget; see :class:`LateLayout`."""
        assert self.late is not None
        layout = self.late.at(seen, count, bound)
        if layout is None:
            return None
        if bound is None:
            return layout, self.budgets(layout)[layer]
        if layout is not bound and budget < (floor := self.policy.min_budget(layout)):
            raise BudgetError(
                f"layer {layer} has a budget of {budget} tokens since {bound!r}, too few for "
                f"{self.policy.label} on {layout!r}, which follows; the smallest budget that works "
                f"is {floor}"
            )
        return layout, budget

    @property
    def _goes_on(self) -> bool:
        """Whether the layout may go on; see :class:`LateLayout`."""
        return self.late is not None and self.late.goes_on

    def _average(self, layout: TokenLayout) -> int:
        """Tokens a layer, before layers share them."""
        policy, budget = self.policy, self._budget
        check_order(policy, layout)
        if layout.length is not None and layout.length > MOST_POSITIONS:
            raise LayoutError(
                f"{layout!r} has {layout.length} tokens, and positions count {MOST_POSITIONS}; "
                f"give it a length that fits, or a TextLayout without one"
            )
        if budget is None:
            if layout.evictable is None:
                raise BudgetError(
                    f"budget=None means everything, but {layout!r} has no length; give the layout "
                    f"a length, or a budget"
                )
            return layout.evictable
        # A fraction is of the layout that is known, and "everything" means all of that.
        average = budget.tokens(layout, goes_on=self._goes_on and budget.kind != "fraction")
        floor = self._floor(layout)
        if average < floor:
            raise BudgetError(
                f"budget={budget} is {average} tokens per layer, too few for {policy.label} on "
                f"{layout!r}; the smallest budget that works is {floor}{_why(layout)}"
            )
        return average

    def _floor(self, layout: TokenLayout) -> int:
        """The smallest budget of a layer, which never has to be more than the layout has."""
        floor = self.policy.min_budget(layout)
        return floor if layout.evictable is None else min(floor, layout.evictable)


def _why(layout: TokenLayout) -> str:
    """Why a layout with groups needs so much."""
    largest = largest_group(layout)
    if largest == 1:
        return ""
    return f": up to {largest} tokens come at once, and need slots beside what is protected"


def _checked(windows: Sequence[int | None] | None, num_layers: int) -> tuple[int | None, ...]:
    """One window a layer."""
    if windows is None:
        return (None,) * num_layers
    if len(windows) != num_layers:
        raise ParameterError(f"windows has {len(windows)} entries for {num_layers} layers")
    for window in windows:
        if window is not None and (type(window) is not int or window < 0):
            raise ParameterError(f"windows={windows!r} must hold None or integers, at least 0")
    return tuple(windows)
