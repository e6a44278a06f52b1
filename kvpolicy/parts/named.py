"""Parts by name: the registries, and how a part is spelled.

A part is spelled ``name``, or ``name:value:value`` with its parameters in order: ``lines:1``. None
of it means anything to a shell or in a list separated by commas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from kvpolicy.budget.budget import Arithmetic, PerLayer, Schedule, Uniform
from kvpolicy.budget.calibrated import Calibrated
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.policy.parts import Decide, Observe, Part, Protect, Score
from kvpolicy.registry import Registry

__all__ = ["KINDS", "PARTS", "available_parts", "read_part", "register_part", "spell_part"]

AnyPart = Part | Schedule
Class = TypeVar("Class", bound=type[AnyPart])

#: What a part of each kind is.
KINDS: dict[str, type[AnyPart]] = {
    "protect": Protect,
    "observe": Observe,
    "score": Score,
    "decide": Decide,
    "schedule": Schedule,
}
PARTS: dict[str, Registry[type[AnyPart]]] = {
    kind: Registry(f"{kind} part", f"kvpolicy.{kind}") for kind in KINDS
}


def register_part(name: str) -> Callable[[Class], Class]:
    """Class decorator: add a part under ``name``, among those of its kind.

    The kind is that of its base class: ``Protect``, ``Observe``, ``Score``, ``Decide`` or
    ``Schedule``.

    Raises:
        ParameterError: the name is taken or malformed, or the class is no part.
    """

    def add(part: Class) -> Class:
        for kind, base in KINDS.items():
            if isinstance(part, type) and issubclass(part, base):
                PARTS[kind].add(name, part)
                part.key = name
                return part
        bases = ", ".join(base.__name__ for base in KINDS.values())
        raise ParameterError(f"{part!r} is no part: derive it from one of {bases}")

    return add


def available_parts(kind: str) -> tuple[str, ...]:
    """Names of all parts of a kind, sorted, those of installed third-party packages included.

    Args:
        kind: ``protect``, ``observe``, ``score``, ``decide`` or ``schedule``.

    Raises:
        ParameterError: there is no such kind.
    """
    if kind not in PARTS:
        raise ParameterError(f"no kind of part is called {kind!r}; {near_matches(kind, PARTS)}")
    return PARTS[kind].names()


def read_part(kind: str, text: str) -> Any:
    """The part of this kind that is spelled so.

    Raises:
        UnknownNameError: no part has this name; near matches are listed.
        ParameterError: a value is wrong, or there are too many.
    """
    name, *values = text.strip().split(":")
    part = PARTS[kind].get(name)
    fields = list(part.model_fields)
    given: dict[str, Any] = {
        field: value if part.model_fields[field].annotation is str else _number(value)
        for field, value in zip(fields, values, strict=False)
    }
    if issubclass(part, PerLayer):
        given = {fields[0]: [_number(value) for value in values]}
    elif len(values) > len(fields):
        takes = ":".join([name, *fields])
        raise ParameterError(f"{kind}={text!r} has {len(values)} values; {name!r} is {takes!r}")
    return part(**given)


def _number(text: str) -> int | float | str:
    """The number that a text spells; the text, where it spells none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def spell_part(kind: str, part: AnyPart) -> str:
    """How a part is spelled.

    Raises:
        ParameterError: it is not a registered part of this kind.
    """
    if not isinstance(part, KINDS[kind]) or not part.key:
        raise ParameterError(
            f"{kind}={part!r} is no {kind} part that has a name; known: "
            f"{', '.join(PARTS[kind].names())}"
        )
    values = list(dict(part).values())
    if isinstance(part, PerLayer):
        values = list(part.shares)
    return ":".join([part.key, *(_spell_value(value) for value in values)])


def _spell_value(value: Any) -> str:
    """As short as it can be read back."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


for _name, _schedule in (
    ("uniform", Uniform),
    ("arithmetic", Arithmetic),
    ("per_layer", PerLayer),
    ("calibrated", Calibrated),
):
    register_part(_name)(_schedule)
