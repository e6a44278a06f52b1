"""The policy that somebody names on a command line: in the registry, or in a module of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from kvpolicy.errors import ParameterError, UnknownNameError, near_matches
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import create

__all__ = ["policy_named", "read_settings"]


def policy_named(name: str, settings: Iterable[str] = ()) -> EvictionPolicy:
    """Make the policy of this name.

    Example:
        >>> policy_named("linear", ["anchors=3"])
        Linear(anchors=3, recent_lines=2)

    Args:
        name: in the registry; or ``package.module:Class``, or ``package.module:policy`` for an
            object that has its parameters already.
        settings: parameters, each ``name=value``.

    Raises:
        UnknownNameError: nothing has this name; near matches are listed.
        ParameterError: a module can't be imported, what it has is no policy, or a setting is wrong.
    """
    parameters = read_settings(settings)
    if ":" not in name or "=" in name:
        return create(name, **parameters)
    found = _imported(name)
    if isinstance(found, EvictionPolicy) and not parameters:
        return found
    if isinstance(found, type) and issubclass(found, EvictionPolicy):
        return found(**parameters)
    what = "has its parameters already" if isinstance(found, EvictionPolicy) else "is no policy"
    raise ParameterError(
        f"policy {name!r}: {found!r} {what}; name a subclass of EvictionPolicy or ScoredPolicy"
    )


def read_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``["anchors=3"]`` as ``{"anchors": 3}``: values are JSON, or else text.

    Raises:
        ParameterError: one of them is not ``name=value``, or a name comes twice.
    """
    read: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (equals and name.isidentifier()) or name in read:
            raise ParameterError(
                f"setting {setting!r} is not like recent_lines=2, each parameter once"
            )
        try:
            read[name] = json.loads(value)
        except json.JSONDecodeError:
            read[name] = value
    return read


def _imported(path: str) -> Any:
    """What ``package.module:name`` is."""
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ParameterError(
            f"policy {path!r}: module {module_name!r} can't be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise UnknownNameError(
            f"policy {path!r}: module {module_name!r} has no {name!r}; {near_matches(name, known)}"
        )
    return getattr(module, name)
