"""compose: a policy out of named parts, from nothing or from another policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kvpolicy.budget.budget import Schedule
from kvpolicy.errors import KVPolicyError, ParameterError, near_matches
from kvpolicy.parts.named import KINDS, read_part, spell_part
from kvpolicy.policy.parts import Part, Parts
from kvpolicy.policy.policy import EvictionPolicy, ScoredPolicy
from kvpolicy.registry import create, register

__all__ = ["Choices", "Compose", "compose"]

#: What a policy made of parts alone leaves to ScoredPolicy.
_SAID_BY_PARTS = ("observers", "schedule", "min_budget", "headroom", "protect", "score", "victims")

AnyPart = Part | Schedule | str


class Choices(BaseModel):
    """The five choices, each a part as it is spelled: ``name:value:value``."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    protect: str = Field("none", description="what may not go: parts joined by '+', or 'none'")
    observe: str = Field("none", description="what is watched of the attention, or 'none'")
    score: str = Field("recency", description="what a token is worth")
    decide: str = Field("token", description="when it is decided")
    schedule: str = Field("uniform", description="how layers share the budget")

    @field_validator("*", mode="before")
    @classmethod
    def _spelled(cls, value: Any, info: Any) -> str:
        """One spelling for each choice, whether it came as text, as a part or as several."""
        kind = info.field_name
        try:
            return "+".join(spell_part(kind, part) for part in _read(kind, value)) or "none"
        except KVPolicyError as error:
            raise ValueError(str(error)) from None

    def parts(self) -> Parts:
        """The parts that are spelled here."""
        observe = _read("observe", self.observe)
        return Parts(
            protect=tuple(_read("protect", self.protect)),
            observe=observe[0] if observe else None,
            score=_read("score", self.score)[0],
            decide=_read("decide", self.decide)[0],
            schedule=_read("schedule", self.schedule)[0],
        )


def _read(kind: str, value: Any) -> list[Any]:
    """The parts that a choice names: any number to protect, at most one to observe, else one."""
    if value is None or value == "none":
        parts = []
    elif isinstance(value, str):
        parts = [read_part(kind, text) for text in value.split("+")]
    else:
        several = not isinstance(value, Part | Schedule) and isinstance(value, Iterable)
        parts = [
            read_part(kind, part) if isinstance(part, str) else part
            for part in (value if several else [value])
        ]
    if kind != "protect" and (len(parts) > 1 or (not parts and kind != "observe")):
        raise ParameterError(f"{kind}={value!r} names {len(parts)} parts; one is needed")
    return parts


@register("compose")
class Compose(ScoredPolicy):
    """Put together from parts: what to protect, observe and score, when to decide, how to share.

    Made by :func:`kvpolicy.compose`.
    """

    choices: Choices = Field(Choices(), description="the five choices, each a part by name")

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, given: Any) -> Any:
        """Take the choices one by one too, and those that are left out from ``base``."""
        if not isinstance(given, Mapping) or not ({"base", *KINDS} & set(given)):
            return given
        for name in given:
            if name not in ("base", *KINDS):
                raise ValueError(f"no choice is called {name!r}; {near_matches(name, KINDS)}")
        changed = {kind: given[kind] for kind in KINDS if kind in given}
        try:
            taken = _taken_from(given.get("base", "compose"))
        except KVPolicyError as error:
            raise ValueError(str(error)) from None
        return {"choices": taken | changed}

    @cached_property
    def parts(self) -> Parts:
        """Those that were chosen."""
        return self.choices.parts()

    def spelled(self) -> str:
        """This policy in one word, for a command line: :func:`kvpolicy.create` reads it back."""
        plain = dict(Choices())
        chosen = (f"{kind}={value}" for kind, value in self.choices if value != plain[kind])
        return "/".join(["compose", *chosen])

    @property
    def label(self) -> str:
        """How it is spelled."""
        return self.spelled()


def _taken_from(base: EvictionPolicy | str) -> dict[str, Any]:
    """The choices of another policy."""
    policy = create(base) if isinstance(base, str) else base
    if not isinstance(policy, ScoredPolicy):
        raise ParameterError(f"{policy!r} is not made of parts: it ranks nothing")
    for name in _SAID_BY_PARTS:
        if getattr(type(policy), name) is not getattr(ScoredPolicy, name):
            raise ParameterError(f"{policy!r} is not made of parts alone: it has its own {name}()")
    return {kind: getattr(policy.parts, kind) for kind in KINDS}


def compose(
    base: EvictionPolicy | str = "compose",
    *,
    protect: AnyPart | Iterable[AnyPart] | None = None,
    observe: AnyPart | None = None,
    score: AnyPart | None = None,
    decide: AnyPart | None = None,
    schedule: AnyPart | None = None,
) -> Compose:
    """Make a policy out of parts: start from one that there is, and change what you name.

    A part is spelled ``name``, or ``name:value:value`` with its parameters in order; several to
    protect are joined by ``+``; ``none`` protects or observes nothing. Parts as objects will do
    too. ``kvpolicy.available_parts(kind)`` lists the names.

    Example:
        >>> import kvpolicy
        >>> h2o_by_line = kvpolicy.compose("h2o", decide="line")
        >>> h2o_by_line.spelled()
        'compose/protect=share:0.5/observe=cumulative_mass/score=mass/decide=line'
        >>> kvpolicy.create("h2o/decide=line") == h2o_by_line
        True

    Args:
        base: a policy made of parts, or its name; by default the plainest there is, which keeps
            the most recent tokens.
        protect: what may not go, besides the prefix.
        observe: what is watched of the attention.
        score: what a token is worth.
        decide: when it is decided.
        schedule: how layers share the budget.

    Raises:
        ParameterError: a part or a value is unknown, or the parts don't fit together.
    """
    named = {
        "protect": protect,
        "observe": observe,
        "score": score,
        "decide": decide,
        "schedule": schedule,
    }
    changed = {kind: part for kind, part in named.items() if part is not None}
    chosen: dict[str, Any] = {"base": base, **changed}
    return Compose(**chosen)
