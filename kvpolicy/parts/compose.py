"""compose: a policy with some of its choices made by named parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Annotated, Any, Self, cast

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from torch import Tensor

from kvpolicy.budget.budget import Schedule
from kvpolicy.errors import KVPolicyError, ParameterError, near_matches
from kvpolicy.layout import TextLayout, TokenLayout
from kvpolicy.observers import AttentionObserver, Need
from kvpolicy.parts.named import PARTS, Bound, read_part, spell_value
from kvpolicy.policy.policy import CacheView, EvictionPolicy, ScoredPolicy
from kvpolicy.policy.probe import Unread, probe_view, refuse_long_window, smallest_budget
from kvpolicy.registry import CHOICES, create, register
from kvpolicy.slots import SlotShape

__all__ = ["Choices", "Compose", "compose"]

#: The plainest policy there is keeps the most recent tokens: what compositions start from.
_PLAINEST: Any = {"name": "streaming_llm", "parameters": {"sinks": 0}}
#: Where it is tried whether parts fit together.
_ANY_TEXT = TextLayout()

AnyPart = Bound | Schedule | str


class Choices(BaseModel):
    """The choices that parts make, each as it is spelled; None for what the base chooses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protect: str | None = Field(None, description="what may not go: parts joined by '+', or 'none'")
    observe: str | None = Field(None, description="what is watched of the attention, or 'none'")
    score: str | None = Field(None, description="what a token is worth")
    decide: str | None = Field(None, description="when it is decided")
    schedule: str | None = Field(None, description="how layers share the budget")

    @field_validator("*", mode="before")
    @classmethod
    def _spelled(cls, value: Any, info: Any) -> str | None:
        """One spelling for each choice, whether it came as text, as a part or as several."""
        if value is None:
            return None
        try:
            return "+".join(map(str, _read(info.field_name, value))) or "none"
        except KVPolicyError as error:
            raise ValueError(str(error)) from None


def _read(kind: str, value: Any) -> list[Bound]:
    """The parts that a choice names: any number to protect, at most one to observe, else one."""
    if value == "none":
        given: list[Any] = []
    elif isinstance(value, str):
        given = value.split("+")
    else:
        given = [value] if isinstance(value, Bound | Schedule) else list(value)
    parts = [
        read_part(kind, part) if isinstance(part, str) else _named(kind, part) for part in given
    ]
    if kind != "protect" and (len(parts) > 1 or (not parts and kind != "observe")):
        raise ParameterError(f"{kind}={value!r} names {len(parts)} parts; one is needed")
    return parts


def _named(kind: str, part: Any) -> Bound:
    """The part of this kind that a schedule is; parts of the other kinds are read from text."""
    if isinstance(part, Bound) and part.part.kind == kind:
        return part
    if kind == "schedule":
        for name in PARTS[kind].names():
            if PARTS[kind].get(name).make is type(part):
                return Bound(PARTS[kind].get(name), part)
    raise ParameterError(
        f"{kind}={part!r} is no {kind} part that has a name; known: "
        f"{', '.join(PARTS[kind].names())}"
    )


def _read_base(value: Any) -> Any:
    """A policy as it is, by its spelling, or as JSON has it."""
    try:
        if isinstance(value, str):
            value = create(value)
        elif isinstance(value, Mapping):
            value = create(value["name"], **value.get("parameters", {}))
        if not isinstance(value, ScoredPolicy):
            raise ParameterError(
                f"base={value!r} ranks no tokens: no part can stand in for its own"
            )
        if not value.key:
            raise ParameterError(
                f"base={value!r} has no name: decorate its class with @kvpolicy.register(name)"
            )
    except KVPolicyError as error:
        raise ValueError(str(error)) from None
    return value


def _told_base(policy: EvictionPolicy) -> dict[str, Any]:
    """As JSON has it."""
    return {"name": policy.key, "parameters": policy.model_dump(mode="json")}


Base = Annotated[
    ScoredPolicy,
    PlainValidator(_read_base),
    PlainSerializer(_told_base),
    WithJsonSchema({"type": "object"}),
]


@register("compose")
class Compose(ScoredPolicy):
    """Any policy that ranks tokens, with some of its choices made by parts instead.

    Made by :func:`kvpolicy.compose`.
    """

    base: Base = Field(
        _PLAINEST,
        validate_default=True,
        description="the policy that makes the other choices; by default the newest tokens stay",
    )
    choices: Choices = Field(Choices(), description="the choices that parts make, by name")

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, given: Any) -> Any:
        """Take the choices one by one too, and those that are left out from a composed base."""
        if not isinstance(given, Mapping):
            return given
        for name in given:
            if name not in ("base", "choices", *CHOICES):
                raise ValueError(f"no choice is called {name!r}; {near_matches(name, CHOICES)}")
        base = _read_base(given.get("base", _PLAINEST))
        choices = given.get("choices", {})
        chosen = dict(choices if isinstance(choices, Choices) else Choices.model_validate(choices))
        chosen |= {kind: given[kind] for kind in CHOICES if kind in given}
        if isinstance(base, Compose):
            chosen = dict(base.choices) | {k: v for k, v in chosen.items() if v is not None}
            base = base.base
        return {"base": base, "choices": chosen}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        chosen, base = self.parts, self.base
        if type(base).victims is not ScoredPolicy.victims and chosen.keys() & {"protect", "score"}:
            raise ValueError(
                f"{base!r} names its victims itself: no part can protect or score there"
            )
        watchers = self.observers(SlotShape(1, 1, 1, torch.device("cpu"), _ANY_TEXT))
        if all(watcher.needs is Need.NONE for watcher in watchers) and self._reads_mass():
            raise ValueError(
                f"score={self.choices.score or base.label!r} reads mass, but observe says to "
                f"watch none"
            )
        return self

    def _reads_mass(self) -> bool:
        try:
            self.score(probe_view(_ANY_TEXT, 4, 4, tensors=True))
        except Unread:
            return True
        except Exception:  # whatever it says of such a view, a cache will say it again
            return False
        return False

    @cached_property
    def parts(self) -> dict[str, list[Bound]]:
        """The parts of each choice that parts make."""
        return {kind: _read(kind, value) for kind, value in self.choices if value is not None}

    @property
    def mixes_heads(self) -> bool:
        """Whether the score does."""
        if "score" in self.parts:
            return self.parts["score"][0].part.mixes_heads
        return self.base.mixes_heads

    @property
    def raster_only(self) -> bool:
        """Whether the score is, or what the base and the parts say can't be said in any order."""
        scores = self.parts.get("score", ())
        return any(score.part.raster_only for score in scores) or super().raster_only

    @property
    def own_ranking(self) -> bool:
        """That of the base, or of a part that only scores."""
        if "score" not in self.parts:
            return self.base.own_ranking
        ranked = type(self.base).victims is ScoredPolicy.victims
        return ranked and self.parts["score"][0].part.choose is None

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """What ``observe`` makes, and what scores watch besides attention."""
        made = list(self.base.observers(shape))
        if "observe" in self.parts:
            others = [watcher for watcher in made if watcher.needs is Need.NONE]
            made = [*(part(shape) for part in self.parts["observe"]), *others]
        for part in self.parts.get("score", ()):
            if part.part.observes is not None:
                made.append(part.part.observes(shape))
        return made

    def schedule(self) -> Schedule:
        """How layers share the budget."""
        if "schedule" in self.parts:
            return cast(Schedule, self.parts["schedule"][0].parameters)
        return self.base.schedule()

    def check(self, num_layers: int) -> None:
        """Refuse what the base refuses."""
        self.base.check(num_layers)

    def min_budget(self, layout: TokenLayout) -> int:
        """What is protected at most, and wanted beside it; what the base says, if that is its own.

        Raises:
            ParameterError: it can't be told, or a window is longer than the time between decisions.
            BudgetError: everything is protected.
        """
        own = type(self.base).min_budget is not ScoredPolicy.min_budget
        if own and not self.parts.keys() & {"protect", "decide"}:
            refuse_long_window(self, layout)
            return self.base.min_budget(layout)
        return smallest_budget(self, layout)

    def headroom(self, view: CacheView) -> int:
        """When it is decided."""
        if "decide" in self.parts:
            return int(self.parts["decide"][0](view))
        return self.base.headroom(view)

    def protect(self, view: CacheView) -> Tensor | None:
        """All that one of the parts protects."""
        if "protect" not in self.parts:
            return self.base.protect(view)
        masks: list[Tensor] = [part(view) for part in self.parts["protect"]]
        return reduce(torch.bitwise_or, masks) if masks else None

    def score(self, view: CacheView) -> Tensor:
        """What a token is worth."""
        if "score" in self.parts:
            return cast(Tensor, self.parts["score"][0](view))
        return self.base.score(view)

    def victims(self, view: CacheView, count: int) -> Tensor:
        """The base's own victims, or those that :meth:`choose` chooses among the unprotected."""
        if type(self.base).victims is not ScoredPolicy.victims:
            return self.base.victims(view, count)
        return super().victims(view, count)

    def choose(self, view: CacheView, count: int, protected: Tensor | None) -> Tensor:
        """As the base does; by the score, or as the score's part does, where that is a part's."""
        if "score" not in self.parts:
            return self.base.choose(view, count, protected)
        part = self.parts["score"][0]
        if part.part.choose is None:
            return super().choose(view, count, protected)
        return cast(Tensor, part.choose(view, count, protected))

    def spelled(self) -> str:
        """This policy in one word, for a command line: :func:`kvpolicy.create` reads it back."""
        base, words = self.base, ["compose"]
        if base != _read_base(_PLAINEST):
            usual = {name: field.default for name, field in type(base).model_fields.items()}
            told = base.model_dump(mode="json").items()
            words = [base.key, *(f"{n}={spell_value(v)}" for n, v in told if v != usual[n])]
        chosen = (f"{kind}={value}" for kind, value in self.choices if value is not None)
        return "/".join([*words, *chosen])

    @property
    def label(self) -> str:
        """How it is spelled."""
        return self.spelled()


def compose(
    base: EvictionPolicy | str = "compose",
    *,
    protect: AnyPart | Iterable[AnyPart] | None = None,
    observe: AnyPart | None = None,
    score: AnyPart | None = None,
    decide: AnyPart | None = None,
    schedule: AnyPart | None = None,
) -> ScoredPolicy:
    """Take a policy that ranks tokens, and let parts make some of its choices.

    A part is spelled ``name``, or ``name:value:value`` with its parameters in order; several to
    protect are joined by ``+``; ``none`` protects or observes nothing. A schedule as an object will
    do too. ``kvpolicy.available_parts(kind)`` lists the names.

    Example:
        >>> import kvpolicy
        >>> h2o_by_line = kvpolicy.compose("h2o", decide="line")
        >>> h2o_by_line.label
        'h2o/decide=line'
        >>> kvpolicy.create("h2o/decide=line") == h2o_by_line
        True

    Args:
        base: a policy that ranks tokens and has a name in the registry, or that name; by default
            the plainest there is, which keeps the most recent tokens.
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
    chosen: dict[str, Any] = {kind: part for kind, part in named.items() if part is not None}
    try:
        policy = _read_base(base)
    except ValueError as error:
        raise ParameterError(str(error)) from None
    if not chosen:
        return cast(ScoredPolicy, policy)
    return Compose(base=policy, **chosen)
