"""Parts by name: what can stand in for one of a policy's five choices, and how it is spelled.

A part is spelled ``name``, or ``name:value:value`` with its parameters in order: ``lines:1``. None
of it means anything to a shell or in a list separated by commas.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from kvpolicy.budget.budget import Arithmetic, PerLayer, Schedule, Uniform
from kvpolicy.budget.calibrated import Calibrated
from kvpolicy.budget.span import lines_in
from kvpolicy.errors import KVPolicyError, ParameterError, near_matches, parameter_error
from kvpolicy.observers import AttentionObserver
from kvpolicy.registry import CHOICES, Registry
from kvpolicy.slots import SlotShape

__all__ = ["PARTS", "Bound", "Part", "available_parts", "read_part", "register_part"]

Made = TypeVar("Made", bound=Callable[..., Any])


class _Parameters(BaseModel):
    """Parameters of a part: strict, like a policy's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Part:
    """A named part: a function (or class) and what the suite must know of it.

    Attributes:
        kind: the choice that it makes, one of ``CHOICES``.
        name: among the parts of its kind.
        make: called with a view (or a shape, to observe) and the parameters.
        choose: of a score, where what goes is chosen as a set: called with a view, a count, what
            is protected, and the parameters; see ``ScoredPolicy.choose``.
        observes: of a score, what it watches itself besides what ``observe`` does.
        mixes_heads: of a score, whether a head's scores depend on other heads.
        raster_only: of a score, whether it makes sense in raster order alone.
    """

    kind: str
    name: str
    make: Callable[..., Any]
    choose: Callable[..., Any] | None = None
    observes: Callable[[SlotShape], AttentionObserver] | None = None
    mixes_heads: bool = False
    raster_only: bool = False

    @cached_property
    def parameters(self) -> type[BaseModel]:
        """A model of its parameters: what stands behind the view in its signature."""
        if self.kind == "schedule":
            return cast(type[Schedule], self.make)
        own = list(inspect.signature(self.make, eval_str=True).parameters.values())[1:]
        fields: dict[str, Any] = {
            each.name: (each.annotation, ... if each.default is each.empty else each.default)
            for each in own
        }
        return create_model(self.name, __base__=_Parameters, **fields)

    def bind(self, **values: Any) -> Bound:
        """This part with its parameters.

        Raises:
            ParameterError: a parameter is unknown, of the wrong type or out of range.
        """
        try:
            return Bound(self, self.parameters(**values))
        except ValidationError as error:
            name = f"{self.kind} part {self.name!r}"
            raise parameter_error(name, self.parameters, error) from None


@dataclass(frozen=True)
class Bound:
    """A part with its parameters."""

    part: Part
    parameters: BaseModel

    def __call__(self, *given: Any) -> Any:
        """What it says of a view; what it makes for a shape."""
        return self.part.make(*given, **dict(self.parameters))

    def choose(self, *given: Any) -> Any:
        """The set that it chooses, where it chooses one."""
        assert self.part.choose is not None
        return self.part.choose(*given, **dict(self.parameters))

    def __str__(self) -> str:
        """How it is spelled."""
        values: Iterable[Any] = dict(self.parameters).values()
        if isinstance(self.parameters, PerLayer):
            values = self.parameters.shares
        given = list(values)
        while given and given[-1] is None:  # a file that is not given
            given.pop()
        return ":".join([self.part.name, *map(spell_value, given)])


PARTS: dict[str, Registry[Part]] = {
    kind: Registry(f"{kind} part", f"kvpolicy.{kind}") for kind in CHOICES
}


def register_part(
    kind: str,
    name: str,
    *,
    choose: Callable[..., Any] | None = None,
    observes: Callable[[SlotShape], AttentionObserver] | None = None,
    mixes_heads: bool = False,
    raster_only: bool = False,
) -> Callable[[Made], Made]:
    """Decorator: what a function says of a view can stand in for one of a policy's choices.

    Its first argument is the view (for ``observe`` the :class:`kvpolicy.SlotShape` of a layer, for
    ``schedule`` the class itself is a :class:`kvpolicy.Schedule`); the others, with types and
    defaults, are its parameters.

    Example:
        >>> import kvpolicy
        >>> @kvpolicy.register_part("score", "halves")
        ... def halves(view, every: int = 2):
        ...     return (view.positions % every == 0).float()
        >>> kvpolicy.create("linear/observe=none/score=halves:3").label
        'linear/observe=none/score=halves:3'

    Args:
        kind: ``protect``, ``observe``, ``score``, ``decide`` or ``schedule``.
        name: lower-case words joined by ``_``.
        choose: of a score, a function that chooses what goes as a set, with the same parameters.
        observes: of a score, an observer that it reads besides what is observed.
        mixes_heads: of a score, whether a head's scores depend on other heads.
        raster_only: of a score, whether it makes sense in raster order alone.

    Raises:
        ParameterError: there is no such kind, or the name is taken or malformed.
    """
    _check_kind(kind)

    def add(made: Made) -> Made:
        PARTS[kind].add(name, Part(kind, name, made, choose, observes, mixes_heads, raster_only))
        return made

    return add


def _check_kind(kind: str) -> None:
    if kind not in PARTS:
        raise ParameterError(f"no kind of part is called {kind!r}; {near_matches(kind, PARTS)}")


def available_parts(kind: str) -> tuple[str, ...]:
    """Names of all parts of a kind, sorted, those of installed third-party packages included.

    Args:
        kind: ``protect``, ``observe``, ``score``, ``decide`` or ``schedule``.

    Raises:
        ParameterError: there is no such kind.
    """
    _check_kind(kind)
    return PARTS[kind].names()


def read_part(kind: str, text: str) -> Bound:
    """The part of this kind that is spelled so.

    Raises:
        UnknownNameError: no part has this name; near matches are listed.
        ParameterError: a value is wrong, or there are too many.
    """
    name, *values = text.strip().split(":")
    part = PARTS[kind].get(name)
    if not isinstance(part, Part):  # what an entry point names, under another name than its own
        raise ParameterError(f"{kind}={text!r}: {part!r} is not registered as {name!r}")
    fields = part.parameters.model_fields
    given: dict[str, Any] = {
        field: value if fields[field].annotation is str else read_value(value)
        for field, value in zip(fields, values, strict=False)
    }
    if part.make is PerLayer:
        given = {"shares": [read_value(value) for value in values]}
    elif len(values) > len(fields):
        takes = ":".join([name, *fields])
        raise ParameterError(f"{kind}={text!r} has {len(values)} values; {name!r} is {takes!r}")
    try:
        return part.bind(**given)
    except KVPolicyError as error:
        raise ParameterError(f"{kind}={text!r}: {error}") from None


def read_value(text: str) -> int | float | str:
    """The number that a text spells; the text, where it spells none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def spell_value(value: Any) -> str:
    """As short as it can be read back: 2 for 2.0, ``2lines`` for two lines."""
    if isinstance(value, str):
        return value if lines_in(value) is None else value.replace(" ", "")
    return json.dumps(value, separators=(",", ":")).removesuffix(".0")


for _name, _schedule in (
    ("uniform", Uniform),
    ("arithmetic", Arithmetic),
    ("per_layer", PerLayer),
    ("calibrated", Calibrated),
):
    register_part("schedule", _name)(_schedule)
