"""How many evictable tokens each layer may hold: budgets, and schedules that share them out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvpolicy.errors import BudgetError, parameter_error
from kvpolicy.layout import TokenLayout

__all__ = ["Arithmetic", "Budget", "PerLayer", "Schedule", "Uniform"]

_ALLOWED = (
    "a positive number of tokens (96), a fraction of the evictable length (0.25, '1/6', '25%') "
    "or a number of lines ('4 lines')"
)


class Budget(BaseModel):
    """A parsed budget: evictable tokens that one KV head of one layer may hold at any instant.

    Example:
        >>> from kvpolicy import RasterLayout
        >>> Budget.parse("1/6").tokens(RasterLayout(rows=28, cols=28, prefix=1))
        130

    Attributes:
        kind: ``tokens``, ``fraction`` or ``lines``.
        amount: how many of them; a fraction is exact (a ratio of integers).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tokens", "fraction", "lines"]
    amount: Fraction

    @classmethod
    def parse(cls, value: Budget | int | float | str) -> Budget:
        """Read a budget in any of its spellings.

        Raises:
            BudgetError: the value is not a budget, not positive, or a fraction above 1.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise BudgetError(f"budget={value!r} is not a budget: give {_ALLOWED}")
        try:
            budget = cls._read(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise BudgetError(f"budget={value!r} is not a budget: give {_ALLOWED}") from None
        if budget.amount <= 0:
            raise BudgetError(f"budget={value!r} holds nothing: give {_ALLOWED}")
        if budget.kind == "fraction" and budget.amount > 1:
            raise BudgetError(
                f"budget={value!r} is a fraction above 1: give at most 1.0 (everything), "
                f"or an integer for a number of tokens"
            )
        return budget

    @classmethod
    def _read(cls, value: int | float | str) -> Budget:
        if isinstance(value, int):
            return cls(kind="tokens", amount=Fraction(value))
        if isinstance(value, float):
            return cls(kind="fraction", amount=Fraction(value).limit_denominator(10**9))
        text = value.strip()
        # Exact numbers of a huge exponent ("1e999999999") would take forever to write out.
        if len(text) > 40 or re.search(r"e[+-]?\d{3}", text, re.IGNORECASE):
            raise ValueError(text)
        if match := re.fullmatch(r"(\d+)\s*lines?", text):
            return cls(kind="lines", amount=Fraction(match[1]))
        if text.endswith("%"):
            return cls(kind="fraction", amount=Fraction(text[:-1]) / 100)
        if re.fullmatch(r"\d+", text):
            return cls(kind="tokens", amount=Fraction(text))
        return cls(kind="fraction", amount=Fraction(text))

    def tokens(self, layout: TokenLayout, *, goes_on: bool = False) -> int:
        """Tokens per layer for this layout, rounded down, at most the layout's evictable length.

        Args:
            layout: where tokens sit.
            goes_on: whether tokens may follow behind the layout's end: more than its evictable
                length is of use then.

        Raises:
            BudgetError: a fraction of a layout without a length, or less than one token.
        """
        evictable = layout.evictable
        if self.kind == "fraction":
            if evictable is None:
                raise BudgetError(
                    f"budget={self} is a fraction, but {type(layout).__name__} has no length; give "
                    f"the layout a length, or the budget as a number of tokens"
                )
            tokens = int(self.amount * evictable)
        elif self.kind == "lines":
            tokens = int(self.amount * layout.line_length)
        else:
            tokens = int(self.amount)
        if evictable is not None and not goes_on:
            tokens = min(tokens, evictable)
        if tokens < 1:
            raise BudgetError(
                f"budget={self} is less than one token of {evictable}; the smallest that works "
                f"is '1/{evictable}'"
            )
        return tokens

    def __str__(self) -> str:
        """The shortest spelling that parses to this budget."""
        if self.kind == "tokens":
            return str(self.amount)
        if self.kind == "lines":
            return f"{self.amount} line{'' if self.amount == 1 else 's'}"
        return f"{self.amount.numerator}/{self.amount.denominator}"


class Schedule(BaseModel, ABC):
    """How layers share a budget.

    Raises:
        ParameterError: a parameter is unknown, missing, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    #: Name among the schedules; set by :func:`kvpolicy.register_part`.
    key: ClassVar[str] = ""

    def __init__(self, /, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            raise parameter_error(type(self).__name__, type(self), error) from None

    @abstractmethod
    def weights(self, num_layers: int) -> Sequence[Fraction]:
        """Shares of the layers, lowest first; only their ratios count."""

    def check(self, layout: TokenLayout) -> None:
        """Raise a BudgetError where this schedule is not for this layout; most fit any."""

    def layers(
        self, budget: int, num_layers: int, *, floor: int = 0, ceiling: int | None = None
    ) -> tuple[int, ...]:
        """Share ``budget * num_layers`` tokens out, exactly.

        Every layer gets the floor, what lies above it is shared by the weights, and what a layer
        can't use (above the ceiling) goes to the others.

        Args:
            budget: tokens per layer on average.
            num_layers: number of layers.
            floor: tokens that no layer may go below (the policy's ``min_budget``).
            ceiling: tokens that no layer can use more than (the layout's evictable length).

        Returns:
            One integer a layer; their sum is ``budget * num_layers``.

        Raises:
            BudgetError: the budget is below the floor.
        """
        ceiling = budget * num_layers if ceiling is None else max(ceiling, budget)
        floor = min(floor, ceiling)
        if budget < floor:
            raise BudgetError(
                f"budget={budget} tokens per layer is below what the policy needs here; "
                f"the smallest budget that works is {floor}"
            )
        weights = self.weights(num_layers)
        shares = [Fraction(floor)] * num_layers
        left = Fraction((budget - floor) * num_layers)
        open_layers = [layer for layer in range(num_layers) if floor < ceiling]
        while left and open_layers:
            total = sum((weights[layer] for layer in open_layers), Fraction(0))
            if total == 0:
                raise BudgetError(
                    f"schedule {self!r} gives no layer a share of the {left} tokens left"
                )
            spare = Fraction(0)
            for layer in open_layers:
                shares[layer] += left * weights[layer] / total
                if shares[layer] > ceiling:
                    spare += shares[layer] - ceiling
                    shares[layer] = Fraction(ceiling)
            left = spare
            open_layers = [layer for layer in open_layers if shares[layer] < ceiling]
        # Largest remainders take what rounding down leaves, lower layers first among equals.
        whole = [int(share) for share in shares]
        by_remainder = sorted(range(num_layers), key=lambda layer: whole[layer] - shares[layer])
        for layer in by_remainder[: budget * num_layers - sum(whole)]:
            whole[layer] += 1
        return tuple(whole)


class Uniform(Schedule):
    """Every layer gets the same."""

    def weights(self, num_layers: int) -> Sequence[Fraction]:
        """The same share for every layer."""
        return [Fraction(1)] * num_layers


class Arithmetic(Schedule):
    """Budgets fall linearly from the lowest layer to the highest.

    PyramidKV (arXiv:2406.02069, section 3.2): the highest layer gets ``1/beta`` of the average,
    the lowest ``2 - 1/beta``.

    Args:
        beta: steepness, at least 1; 1 is uniform.
    """

    beta: float = Field(20.0, ge=1.0, le=1e6)

    def weights(self, num_layers: int) -> Sequence[Fraction]:
        """Linear in the layer."""
        low = 1 / Fraction(self.beta).limit_denominator(10**6)
        if num_layers == 1:
            return [Fraction(1)]
        step = (2 - 2 * low) / (num_layers - 1)
        return [2 - low - step * layer for layer in range(num_layers)]


class PerLayer(Schedule):
    """Shares given layer by layer, lowest first.

    Args:
        shares: one positive number a layer; only their ratios count.
    """

    shares: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        min_length=1,
        strict=False,  # a list will do
    )

    def weights(self, num_layers: int) -> Sequence[Fraction]:
        """The given shares.

        Raises:
            BudgetError: the number of shares is not the number of layers, or all are 0.
        """
        if len(self.shares) != num_layers:
            raise BudgetError(
                f"PerLayer has {len(self.shares)} shares for {num_layers} layers: give one a layer"
            )
        if sum(self.shares) == 0:
            raise BudgetError(f"PerLayer shares={self.shares} must not all be 0")
        return [Fraction(share).limit_denominator(10**9) for share in self.shares]
