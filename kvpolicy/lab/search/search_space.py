"""What can be searched of a policy: its parameters, between the bounds that its fields declare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict

from kvpolicy.budget.budget import Budget
from kvpolicy.budget.span import lines_in, tokens_of
from kvpolicy.cache.cache import PolicyCache
from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.lab.run.subject import Subject
from kvpolicy.layout import LateLayout, TokenLayout
from kvpolicy.named import make_policy

__all__ = ["Choice", "Range", "Space", "check_setting", "search_space", "usual_parameters"]


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    whole: bool
    log: bool = False

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        return f"{kind} from {self.low:g} to {self.high:g}{', logarithmically' * self.log}"


class Choice(BaseModel):
    """A parameter that takes one of some values, without an order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.values))


Space = dict[str, Range | Choice]


def search_space(policy: str, budget: str, subject: Subject) -> Space:
    """What can be searched: each parameter between the bounds that its field declares.

    What may be given in tokens or in lines is searched in tokens. A whole number without an upper
    bound goes up to what the budget allows, the other parameters at their least. Seeds are left
    alone.

    Raises:
        ParameterError: the policy has no parameter to search.
        BudgetError: the budget is too small for this policy.
    """
    kind = type(make_policy(policy, {}))
    tokens = Budget.parse(budget).tokens(_layout_of(subject))
    space: Space = {}
    for name, field in kind.model_fields.items():
        if name == "seed":
            continue
        if field.annotation is bool:
            space[name] = Choice(values=(False, True))
        elif get_origin(field.annotation) is Literal:
            space[name] = Choice(values=get_args(field.annotation))
        elif field.annotation in (int, float, int | str):
            whole = field.annotation is not float
            low, high = _bounds(field.metadata, whole)
            if field.annotation == int | str:
                low, high = _least_tokens(kind, name), None
            if low is None:
                continue
            if high is None and whole:
                high = low + tokens
            if high is not None:
                space[name] = Range(low=low, high=high, whole=whole)
    if not space:
        raise ParameterError(f"policy {policy!r} has no parameter that could be searched")
    least = {name: r.low for name, r in space.items() if isinstance(r, Range) and r.whole}
    usual = usual_parameters(policy, subject)

    def works(name: str, value: int) -> bool:
        """Whether a value goes with the least or the usual values of the others, or beside itself.

        A window can't be longer than the interval between two decisions, say.
        """
        usually = {other: usual[other] for other in least}
        for others in (_whole(least), usually, dict.fromkeys(least, value)):
            try:
                check_setting(policy, others | {name: value}, budget, subject)
            except (ParameterError, BudgetError):
                continue
            return True
        return False

    for name, part in space.items():
        if isinstance(part, Range):
            if part.whole:
                low, high = max(int(part.low), usual[name]), int(part.high)
                while low < high:  # the largest that works; some fields take odd numbers only
                    middle = (low + high + 1) // 2
                    if works(name, middle) or works(name, middle - 1):
                        low = middle
                    else:
                        high = middle - 1
                if low > usual[name] and not works(name, low):
                    low -= 1
                part = part.model_copy(update={"high": low})
            log = part.low > 0 and part.high / part.low >= 50
            space[name] = part.model_copy(update={"log": log})
    return space


def _layout_of(subject: Subject) -> TokenLayout:
    """Where the subject's tokens sit, by which lines are counted in tokens."""
    if isinstance(subject.layout, LateLayout):
        raise ParameterError("tune needs a subject whose layout is known from the beginning")
    return subject.layout


def usual_parameters(policy: str, subject: Subject) -> dict[str, Any]:
    """A policy's defaults, lines counted in tokens of the subject's layout."""
    layout = _layout_of(subject)
    usual = make_policy(policy, {}).model_dump(mode="json")
    return {
        name: value
        if not isinstance(value, str) or lines_in(value) is None
        else tokens_of(value, layout)
        for name, value in usual.items()
    }


def check_setting(policy: str, parameters: dict[str, Any], budget: str, subject: Subject) -> None:
    """Refuse what can't be, before it costs a measurement."""
    made = make_policy(policy, parameters)
    PolicyCache(made, budget, layout=subject.layout, num_layers=subject.num_layers)


def _whole(parameters: dict[str, Any]) -> dict[str, Any]:
    """Bounds of whole numbers, which are written as floats."""
    return {name: int(value) for name, value in parameters.items()}


def _least_tokens(kind: type[BaseModel], name: str) -> float | None:
    """The fewest tokens of a field that takes tokens or lines; None for any other."""
    for way in kind.model_json_schema()["properties"][name].get("anyOf", ()):
        if way.get("type") == "integer":
            return float(way.get("minimum", 0))
    return None


def _bounds(metadata: Sequence[Any], whole: bool) -> tuple[float | None, float | None]:
    """Lowest and highest value that a field allows; None where it sets no bound."""
    low: float | None = None
    high: float | None = None
    step = 1 if whole else 1e-6
    for limit in metadata:
        match limit:
            case Ge(ge):
                low = float(ge)  # type: ignore[arg-type]
            case Gt(gt):
                low = float(gt) + step  # type: ignore[arg-type]
            case Le(le):
                high = float(le)  # type: ignore[arg-type]
            case Lt(lt):
                high = float(lt) - step  # type: ignore[arg-type]
    return low, high
