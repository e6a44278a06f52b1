"""The five independent choices that make a strategy, and the parts that make them.

What may not go (protect), what is watched (observe), what a token is worth (score), when it is
decided (decide) and how layers share the budget (schedule). Stock parts are in ``kvpolicy.parts``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from kvpolicy.budget.budget import Schedule, Uniform
from kvpolicy.errors import BudgetError, ParameterError, parameter_error
from kvpolicy.layout import TokenLayout
from kvpolicy.observers import AttentionObserver
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape

__all__ = ["Decide", "EachToken", "Observe", "Part", "Parts", "Protect", "Score"]

#: Rounds in which a budget that holds all that is protected must be found.
_ROUNDS = 10_000


class Part(BaseModel, ABC):
    """One choice, with its parameters. Frozen, and like a policy without any state.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    #: Name among the parts of its kind; set by :func:`kvpolicy.register_part`.
    key: ClassVar[str] = ""

    def __init__(self, /, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            name = f"part {self.key or type(self).__name__!r}"
            raise parameter_error(name, type(self), error) from None


class Protect(Part):
    """Tokens that may not go."""

    @abstractmethod
    def mask(self, view: CacheView) -> Tensor:
        """These tokens, bool ``[B, H, S]``."""

    @abstractmethod
    def most(self, budget: int, layout: TokenLayout, column: int) -> int:
        """How many cached tokens it protects at most.

        Args:
            budget: evictable tokens of a layer.
            layout: where tokens sit.
            column: of the token about to come.
        """


class Observe(Part):
    """What is watched of the attention."""

    @property
    def window(self) -> int:
        """Last queries before a decision that it listens to; 0 if decisions don't matter to it."""
        return 0

    @abstractmethod
    def observer(self, shape: SlotShape) -> AttentionObserver:
        """The observer of one layer of one generation."""


class Score(Part):
    """What a token is worth."""

    #: Whether it reads ``view.mass``, so that something must be observed.
    needs_mass: ClassVar[bool] = False
    #: Whether a head's scores depend on other heads.
    mixes_heads: ClassVar[bool] = False

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """What it watches itself, in one layer, besides what ``observe`` does; nothing by default.

        These come after that one, whose reading is ``view.mass``.
        """
        return ()

    @abstractmethod
    def worth(self, view: CacheView) -> Tensor:
        """``[B, H, S]``; higher = keep. NaN is not allowed."""

    def choose(self, view: CacheView, score: Tensor, count: int) -> Tensor | None:
        """Choose victims where a token's worth depends on what else goes; None to rank them.

        Args:
            view: the layer.
            score: what :meth:`worth` gave, ``[B, H, S]``, float32: but minus infinity where a slot
                is empty, which goes first, above all others where a token is protected, and
                infinity for the prefix.
            count: how many slots are wanted.

        Returns:
            Slots, int64 ``[B, H, count]``, distinct within a head, in the order in which they go.
        """
        return None

    def rank(self, view: CacheView) -> Tensor | None:
        """The same order in integers, int32 ``[B, H, S]``, distinct, from 0; None if it has none.

        It saves what floats need besides: looking for NaN, and breaking ties.
        """
        return None


class Decide(Part):
    """When it is decided, and for how many tokens."""

    @property
    @abstractmethod
    def interval(self) -> int:
        """Tokens from one decision to the next; 0 where that depends on the layout."""

    @abstractmethod
    def wanted(self, layout: TokenLayout, column: int) -> int:
        """Slots that a decision before a token of this column makes room for, at most."""

    @abstractmethod
    def headroom(self, view: CacheView) -> int:
        """Slots that must be free before the token ``view.seen``; see ``EvictionPolicy``."""


class EachToken(Decide):
    """Decide before every token, for one token."""

    @property
    def interval(self) -> int:
        """One."""
        return 1

    def wanted(self, layout: TokenLayout, column: int) -> int:
        """One."""
        return 1

    def headroom(self, view: CacheView) -> int:
        """One."""
        return 1


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The five choices.

    Args:
        protect: what may not go besides the prefix; all of these together.
        observe: what is watched; None for nothing.
        score: what a token is worth; None where a policy says so itself.
        decide: when it is decided.
        schedule: how layers share the budget.

    Raises:
        ParameterError: the parts don't fit together.
    """

    protect: tuple[Protect, ...] = ()
    observe: Observe | None = None
    score: Score | None = None
    decide: Decide = field(default_factory=EachToken)
    schedule: Schedule = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if self.score is not None and self.score.needs_mass and self.observe is None:
            raise ParameterError(f"score={self.score!r} reads mass, but observe says to watch none")
        window = 0 if self.observe is None else self.observe.window
        interval = self.decide.interval
        if window > interval:
            when = f"interval={interval}" if interval else f"{self.decide!r}, whose interval varies"
            raise ParameterError(
                f"window={window} must be at most {when}: votes are collected between decisions"
            )

    def min_budget(self, layout: TokenLayout) -> int:
        """The smallest budget that holds all that is protected, and what a decision makes room for.

        Raises:
            BudgetError: there is none.
        """
        last = layout.line_length - 1
        budget = 1
        for _ in range(_ROUNDS):
            needed = max(
                sum(part.most(budget, layout, column) for part in self.protect)
                + self.decide.wanted(layout, column)
                for column in (0, last)
            )
            if needed <= budget:
                return budget
            budget = needed
        raise BudgetError(f"no budget is enough: protect={self.protect} leaves nothing to evict")
