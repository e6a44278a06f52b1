"""What can be searched of a policy or decoder: its parameters, between its fields' own bounds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict

from kvpolicy.budget.budget import Budget
from kvpolicy.budget.span import lines_in, tokens_of
from kvpolicy.cache.cache import PolicyCache
from kvpolicy.decoding import Decoder
from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.lab.run.plan import SEQUENTIAL
from kvpolicy.lab.run.subject import Subject
from kvpolicy.layout import LateLayout, TokenLayout
from kvpolicy.named import make_policy

__all__ = [
    "Choice",
    "Range",
    "Space",
    "check_setting",
    "search_space",
    "usual_parameters",
    "with_parameters",
]


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


def search_space(policy: str, budget: str, subject: Subject, decoder: str = SEQUENTIAL) -> Space:
    """What can be searched: each parameter between the bounds that its field declares.

    What may be given in tokens or in lines is searched in tokens. A whole number without an upper
    bound goes up to what the budget allows, the other parameters at their least. Seeds are left
    alone.

    Args:
        policy: a name, or ``package.module:Class``.
        budget: in any spelling.
        subject: whose layout they must go with.
        decoder: where it is not ``sequential`` its parameters are searched instead of the policy's,
            but for those that it is spelled with.

    Raises:
        ParameterError: there is no parameter to search, or the decoder can't draw on this layout.
        BudgetError: the budget is too small for this policy.
    """
    drawn_by = Decoder.parse(decoder)
    kind: type[BaseModel] = type(make_policy(policy, {}))
    given: Collection[str] = ("seed",)
    if decoder != SEQUENTIAL:
        drawn_by.check(_layout_of(subject))
        kind, given = type(drawn_by), drawn_by.model_fields_set | {"seed"}
    tokens = Budget.parse(budget).tokens(_layout_of(subject))
    space: Space = {}
    for name, field in kind.model_fields.items():
        if name in given:
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
        whose = f"policy {policy!r}" if decoder == SEQUENTIAL else f"decoder {decoder!r}"
        raise ParameterError(f"{whose} has no parameter that could be searched")
    least = {name: r.low for name, r in space.items() if isinstance(r, Range) and r.whole}
    usual = usual_parameters(policy, subject, decoder)

    def works(name: str, value: int) -> bool:
        """Whether a value goes with the least or the usual values of the others, or beside itself.

        A window can't be longer than the interval between two decisions, say.
        """
        usually = {other: usual[other] for other in least}
        for others in (_whole(least), usually, dict.fromkeys(least, value)):
            try:
                check_setting(policy, others | {name: value}, budget, subject, decoder)
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


def usual_parameters(policy: str, subject: Subject, decoder: str = SEQUENTIAL) -> dict[str, Any]:
    """Defaults of what is searched, lines counted in tokens of the subject's layout."""
    if decoder != SEQUENTIAL:
        return Decoder.parse(decoder).model_dump(mode="json")
    layout = _layout_of(subject)
    usual = make_policy(policy, {}).model_dump(mode="json")
    return {
        name: value
        if not isinstance(value, str) or lines_in(value) is None
        else tokens_of(value, layout)
        for name, value in usual.items()
    }


def check_setting(
    policy: str,
    parameters: dict[str, Any],
    budget: str,
    subject: Subject,
    decoder: str = SEQUENTIAL,
) -> None:
    """Refuse what can't be, before it costs a measurement."""
    if decoder != SEQUENTIAL:
        with_parameters(decoder, parameters).check(_layout_of(subject))
        parameters = {}
    made = make_policy(policy, parameters)
    PolicyCache(made, budget, layout=subject.layout, num_layers=subject.num_layers)


def with_parameters(decoder: str, parameters: dict[str, Any]) -> Decoder:
    """A decoder as it is spelled, and with these parameters, too."""
    spelled = Decoder.parse(decoder)
    set_already = {name: getattr(spelled, name) for name in spelled.model_fields_set}
    return type(spelled)(**(set_already | parameters))


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
