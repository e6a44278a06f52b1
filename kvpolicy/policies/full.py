"""The baseline: nothing is evicted."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.errors import BudgetError
from kvpolicy.layout import TokenLayout
from kvpolicy.policy.policy import CacheView, EvictionPolicy
from kvpolicy.registry import register

__all__ = ["Full"]


@register("full")
class Full(EvictionPolicy):
    """Keep everything: the full cache that other policies are compared with."""

    def min_budget(self, layout: TokenLayout) -> int:
        """All evictable tokens of the layout; where it has no length, any budget will do."""
        return layout.evictable or 1

    def victims(self, view: CacheView, count: int) -> Tensor:
        """Refuse: a full cache that evicts is none.

        Raises:
            BudgetError: always; the sequence has outgrown the budget.
        """
        raise BudgetError(
            f"policy 'full' can't evict, and position {view.seen} does not fit into "
            f"budget={view.budget}; the smallest budget that works is {view.budget + count}"
        )
