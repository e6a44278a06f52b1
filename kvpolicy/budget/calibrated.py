"""Calibrated: budgets of layers that were measured, from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from kvpolicy.budget.budget import Schedule
from kvpolicy.errors import BudgetError
from kvpolicy.layout import TokenLayout
from kvpolicy.measured import read_measured

__all__ = ["Calibrated", "LayerBudgets", "read_layer_budgets"]


class LayerBudgets(BaseModel):
    """What ``kvpolicy calibrate`` writes.

    Attributes:
        kind: what the file is.
        version: of its form.
        subject: what was calibrated on.
        policy: that was calibrated, as it is spelled.
        layout: where tokens sat.
        budget: tokens a layer on average.
        layers: tokens of each layer, lowest first; their sum is ``budget * len(layers)``.
        items: how many calibration items it was measured on.
        uniform: main metric on them with the same budget for every layer.
        found: main metric on them with these budgets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["kvpolicy layer budgets"] = "kvpolicy layer budgets"
    version: Literal[1] = 1
    subject: str
    policy: str
    layout: str
    budget: int = Field(ge=1)
    layers: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    items: int = Field(ge=1)
    uniform: float
    found: float

    @model_validator(mode="after")
    def _exact(self) -> LayerBudgets:
        if sum(self.layers) != self.budget * len(self.layers):
            raise ValueError(
                f"layers={self.layers} hold {sum(self.layers)} tokens, not budget={self.budget} "
                f"times {len(self.layers)}"
            )
        return self

    def text(self) -> str:
        """The file that :func:`read_layer_budgets` reads: JSON."""
        return json.dumps(self.model_dump(), indent=2) + "\n"


def read_layer_budgets(path: str | Path) -> LayerBudgets:
    """Read what ``kvpolicy calibrate`` wrote.

    Raises:
        ParameterError: the file can't be read, is no such file, or contradicts itself.
    """
    return read_measured(path, LayerBudgets, "layer budgets", "kvpolicy calibrate")


class Calibrated(Schedule):
    """Budgets of layers from a file that ``kvpolicy calibrate`` wrote.

    The file is read when the schedule is made. Another layout, number of layers or budget than it
    was measured for is refused; another policy is not.

    Args:
        file: its path.

    Raises:
        ParameterError: the file can't be read, or is damaged.
    """

    file: str = Field(min_length=1, description="what kvpolicy calibrate wrote")
    _found: LayerBudgets = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Read the file."""
        self._found = read_layer_budgets(self.file)

    @property
    def found(self) -> LayerBudgets:
        """What the file says."""
        return self._found

    def check(self, layout: TokenLayout) -> None:
        """Refuse another layout.

        Raises:
            BudgetError: the file is for another one.
        """
        if repr(layout) != self._found.layout:
            raise BudgetError(
                f"layer budgets {self.file} are for {self._found.layout}, not {layout!r}; "
                f"calibrate on this layout"
            )

    def weights(self, num_layers: int) -> Sequence[Fraction]:
        """The budgets themselves.

        Raises:
            BudgetError: the file is for another number of layers.
        """
        if num_layers != len(self._found.layers):
            raise BudgetError(
                f"layer budgets {self.file} are for {len(self._found.layers)} layers, not "
                f"{num_layers}"
            )
        return [Fraction(tokens) for tokens in self._found.layers]

    def layers(
        self, budget: int, num_layers: int, *, floor: int = 0, ceiling: int | None = None
    ) -> tuple[int, ...]:
        """The budgets as they were measured.

        Raises:
            BudgetError: another number of layers, another budget, or a layer has less than the
                policy needs.
        """
        self.weights(num_layers)
        found = self._found
        if budget != found.budget:
            raise BudgetError(
                f"layer budgets {self.file} are for {found.budget} tokens per layer, not {budget}; "
                f"give budget={found.budget}, or calibrate for {budget}"
            )
        if min(found.layers) < floor:
            raise BudgetError(
                f"layer budgets {self.file}, measured with {found.policy}, leave a layer "
                f"{min(found.layers)} tokens, and this policy needs {floor}; calibrate with it"
            )
        if ceiling is not None and max(found.layers) > ceiling:
            raise BudgetError(
                f"layer budgets {self.file} give a layer {max(found.layers)} tokens, more than "
                f"the {ceiling} there are"
            )
        return tuple(found.layers)
