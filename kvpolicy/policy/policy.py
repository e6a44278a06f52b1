"""EvictionPolicy: which tokens go when a new one needs room.

A policy *is* its frozen pydantic parameters and a few short methods. It holds no state of a
generation (that lives in the observers which it makes for each layer), never sees a model, and
never moves a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from kvpolicy.budget.budget import Schedule, Uniform
from kvpolicy.errors import AttentionError, ParameterError, parameter_error
from kvpolicy.layout import TokenLayout
from kvpolicy.observers import AttentionObserver
from kvpolicy.ops.rank import leveled, lowest, numbers_only
from kvpolicy.policy.parts import Parts, Score
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape

__all__ = ["CacheView", "EvictionPolicy", "ScoredPolicy"]


class EvictionPolicy(BaseModel, ABC):
    """A strategy: decides which slots are reclaimed, one layer and one decision at a time.

    Subclass :class:`ScoredPolicy` unless the decision is not a ranking. Fields are the policy's
    parameters.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
    """

    # Strict: "3" and 3.0 are no integers. An integer will do for a float, and JSON for all.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    #: Registry name; set by :func:`kvpolicy.register`.
    key: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        # A subclass of a registered policy is another policy, and must not go by its name.
        if "key" not in cls.__dict__:
            cls.key = ""

    def __init__(self, /, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            name = f"policy {self.key or type(self).__name__!r}"
            raise parameter_error(name, type(self), error) from None

    @property
    def label(self) -> str:
        """What it goes by in a table: its name in the registry, or that of its class."""
        return self.key or type(self).__name__

    @property
    def mixes_heads(self) -> bool:
        """Whether a head's decisions depend on other heads' attention (TOVA's do)."""
        return False

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """Make the observers of one layer of one generation; none by default."""
        return ()

    def schedule(self) -> Schedule:
        """How layers share the budget; all the same by default."""
        return Uniform()

    def min_budget(self, layout: TokenLayout) -> int:
        """The smallest budget of a layer with which this policy works on this layout."""
        return 1

    def headroom(self, view: CacheView) -> int:
        """Slots that must be free before the token ``view.seen`` is written: 1, or a line.

        The cache asks ahead of time, so the answer may depend on ``seen``, ``room``, ``layer``,
        ``budget`` and ``layout``, not on tensors.
        """
        return 1

    @abstractmethod
    def victims(self, view: CacheView, count: int) -> Tensor:
        """Choose the slots to reclaim.

        Args:
            view: the layer, just before the token ``view.seen`` is written.
            count: how many slots are wanted.

        Returns:
            Slots, int64 ``[B, H, count]``, distinct within a head, worst first; they are
            reclaimed in that order.
        """


class ScoredPolicy(EvictionPolicy):
    """A policy that ranks tokens.

    Name its ``parts``, or override :meth:`score`, and any other method that no part says: what is
    not said is the default of :class:`Parts`.

    Victims are the unprotected tokens with the lowest scores; among equal scores the older
    position goes first. Empty slots go before any token.
    """

    @cached_property
    def parts(self) -> Parts:
        """The five choices that this policy is made of."""
        return Parts()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.parts.score is None and type(self).score is ScoredPolicy.score:
            raise ValueError("override score(view), or name a score in parts")
        return self

    def __copy__(self) -> Self:
        """A copy makes its own parts: its parameters may be about to change."""
        made = super().__copy__()
        made.__dict__.pop("parts", None)
        return made

    @property
    def mixes_heads(self) -> bool:
        """Whether the score does."""
        return self.parts.score is not None and self.parts.score.mixes_heads

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """What the parts watch."""
        watch, score = self.parts.observe, self.parts.score
        return (
            *(() if watch is None else (watch.observer(shape),)),
            *(() if score is None else score.observers(shape)),
        )

    def schedule(self) -> Schedule:
        """How the parts share the budget."""
        return self.parts.schedule

    def min_budget(self, layout: TokenLayout) -> int:
        """What the parts protect, and what a decision makes room for."""
        return self.parts.min_budget(layout)

    def headroom(self, view: CacheView) -> int:
        """When the parts decide."""
        return self.parts.decide.headroom(view)

    def protect(self, view: CacheView) -> Tensor | None:
        """Tokens that may not go besides the prefix, bool ``[B, H, S]``; None for no others."""
        mask: Tensor | None = None
        for part in self.parts.protect:
            mask = part.mask(view) if mask is None else mask | part.mask(view)
        return mask

    def score(self, view: CacheView) -> Tensor:
        """How much each token is worth, ``[B, H, S]``; higher = keep. NaN is not allowed."""
        if self.parts.score is None:
            raise ParameterError(f"{self!r} has no score")
        return self.parts.score.worth(view)

    def victims(self, view: CacheView, count: int) -> Tensor:
        """The ``count`` lowest scores among the unprotected, worst first.

        Raises:
            AttentionError: a score is NaN (on a device other than the CPU it is asserted there,
                so that nobody waits for it); the prefix stays either way.
        """
        protected = self.protect(view)
        # What the part says holds only where nobody overrides the score.
        part = self.parts.score if type(self).score is ScoredPolicy.score else None
        rank = None if part is None else part.rank(view)
        score = self.score(view).to(torch.float32) if rank is None else rank
        where: dict[str, Any] = {
            "protected": protected,
            "pinned": view.pinned if view.may_be_empty else None,
            # Where no slot was ever emptied, the prefix lies where it was put: in the first.
            "prefix": view.layout.prefix,
            "may_be_empty": view.may_be_empty,
        }
        if part is not None and type(part).choose is not Score.choose:
            level = leveled(score, view.positions, **where)
            if not numbers_only(level):
                raise self._nan(view)
            chosen = part.choose(view, level, count)
            if chosen is not None:
                return chosen
        slots, numbers = lowest(score, view.positions, count, **where)
        if not numbers:
            raise self._nan(view)
        return slots

    def _nan(self, view: CacheView) -> AttentionError:
        return AttentionError(
            f"layer {view.layer}: {self.label} scores a token NaN before position {view.seen}; "
            f"the model's keys or values are not finite, or score() is undefined for some token"
        )
