"""Registries: names that anybody's package can join, through a decorator or an entry point."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

import torch

from kvpolicy.errors import LayoutError, ParameterError, UnknownNameError, near_matches
from kvpolicy.layout import RasterLayout, TokenLayout, in_raster_order
from kvpolicy.observers import Need
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.slots import SlotShape

__all__ = [
    "CHOICES",
    "POLICIES",
    "PolicySpec",
    "Registry",
    "available",
    "check_order",
    "create",
    "register",
    "spec",
]

Item = TypeVar("Item")
Policy = TypeVar("Policy", bound=type[EvictionPolicy])


class Registry(Generic[Item]):
    """Names to things. Entry points are listed at once, but loaded only when asked for by name.

    Args:
        kind: what the registry holds, for error messages ("policy").
        group: entry-point group that other packages join.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._items: dict[str, Item] = {}

    def add(self, name: str, item: Item) -> None:
        """Add an item.

        Raises:
            ParameterError: the name is not lower-case words, or it is taken by another item.
        """
        if not name.isascii() or not name.replace("-", "_").isidentifier() or name != name.lower():
            raise ParameterError(
                f"{self.kind} name {name!r} must be lower-case words joined by '_' or '-'"
            )
        held = self._items.setdefault(name, item)
        if held is not item:
            raise ParameterError(f"{self.kind} name {name!r} is taken by {held!r}")

    def names(self) -> tuple[str, ...]:
        """All names, sorted, those of entry points included."""
        return tuple(sorted({*self._items, *self._entry_points()}))

    def waiting(self) -> dict[str, str]:
        """Names whose entry points have not been loaded, and the packages that they come from."""
        return {
            name: point.dist.name if point.dist else point.module
            for name, point in sorted(self._entry_points().items())
            if name not in self._items
        }

    def get(self, name: str) -> Item:
        """The item of this name, loading its entry point if need be.

        Raises:
            UnknownNameError: nothing has this name; near matches are listed.
            ParameterError: the entry point can't be loaded.
        """
        if not isinstance(name, str):
            raise UnknownNameError(f"{self.kind} name {name!r} must be a string")
        if name in self._items:
            return self._items[name]
        point = self._entry_points().get(name)
        if point is None:
            raise UnknownNameError(
                f"no {self.kind} is called {name!r}; {near_matches(str(name), self.names())}"
            )
        try:
            item = point.load()
        except Exception as error:
            raise ParameterError(
                f"{self.kind} {name!r} of entry point {point.value!r} can't be loaded: {error}"
            ) from error
        self._items.setdefault(name, item)
        return self._items[name]

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


POLICIES: Registry[type[EvictionPolicy]] = Registry("policy", "kvpolicy.policies")
_PAPERS: dict[str, str] = {}
#: What parts can say in a policy's place; see :func:`kvpolicy.compose`.
CHOICES = ("protect", "observe", "score", "decide", "schedule")


@dataclass(frozen=True)
class PolicySpec:
    """What the registry knows about a policy.

    Attributes:
        name: its key in the registry.
        summary: first line of its docstring.
        paper: where it comes from.
        needs: how much attention it must see, with its default parameters.
        parameters: JSON schema of its parameters.
    """

    name: str
    summary: str
    paper: str
    needs: Need
    parameters: dict[str, Any]


def register(name: str, *, paper: str = "") -> Callable[[Policy], Policy]:
    """Class decorator: add a policy to the registry under ``name``.

    Args:
        name: lower-case words joined by ``_``.
        paper: where the policy comes from, e.g. ``arXiv:2512.04857``.

    Raises:
        ParameterError: the name is taken or malformed.
    """

    def add(policy: Policy) -> Policy:
        POLICIES.add(name, policy)
        policy.key = name
        _PAPERS[name] = paper
        return policy

    return add


def available() -> tuple[str, ...]:
    """Names of all policies, sorted, those of installed third-party packages included."""
    return POLICIES.names()


def create(name: str, **parameters: Any) -> EvictionPolicy:
    """Make a policy by name, or change some of it: ``linear/anchors=14/observe=cumulative_mass``.

    Args:
        name: a name in the registry; behind it, each after a ``/``, parameters, and choices that
            parts are to make (see :func:`kvpolicy.compose`).
        **parameters: of the policy.

    Raises:
        UnknownNameError: no policy has this name; near matches are listed.
        ParameterError: a parameter or a part is unknown or out of range, or comes twice.
    """
    if not isinstance(name, str) or "=" not in name:
        return POLICIES.get(name)(**parameters)
    base, *changes = re.split(r"/(?=[^/=]+=)", name)  # a value may have a slash, like a file's
    fields = POLICIES.get(base).model_fields
    chosen: dict[str, str] = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field in chosen or field in parameters:
            raise ParameterError(f"policy {name!r} says {field}= twice")
        if field in CHOICES:
            chosen[field] = value
        elif field in fields:
            parameters[field] = _value(value, fields[field].annotation)
        else:
            known = near_matches(field, [*CHOICES, *fields])
            raise ParameterError(f"policy {name!r}: no choice is called {field!r}; {known}")
    policy = create(base, **parameters)
    return POLICIES.get("compose")(base=policy, **chosen) if chosen else policy


def _value(text: str, kind: Any) -> Any:
    """What JSON makes of a text; the text itself where that is meant, or where it is no JSON."""
    if kind is str:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_order(policy: EvictionPolicy, layout: TokenLayout) -> None:
    """Refuse a policy that makes sense line by line where tokens come in another order.

    Raises:
        LayoutError: it does; the policies that work in any order are named.
    """
    if in_raster_order(layout) or not policy.raster_only:
        return
    others = []
    for name in sorted(POLICIES._items):
        with suppress(ParameterError):  # one that has no defaults
            if name != "compose" and not create(name).raster_only:
                others.append(name)
    raise LayoutError(
        f"policy {policy.label!r} needs tokens line by line, and this OrderedLayout has another "
        f"order; in any order work: {', '.join(others)}"
    )


def spec(name: str) -> PolicySpec:
    """What the registry knows about a policy.

    Raises:
        UnknownNameError: no policy has this name; near matches are listed.
    """
    policy = POLICIES.get(name)
    layout = RasterLayout(rows=1, cols=1)
    shape = SlotShape(1, 1, 1, torch.device("cpu"), layout)
    required = any(field.is_required() for field in policy.model_fields.values())
    watchers = () if required else policy().observers(shape)
    return PolicySpec(
        name=name,
        summary=(policy.__doc__ or "").strip().splitlines()[0] if policy.__doc__ else "",
        paper=_PAPERS.get(name, ""),
        needs=max((watcher.needs for watcher in watchers), default=Need.NONE),
        parameters=policy.model_json_schema(),
    )
