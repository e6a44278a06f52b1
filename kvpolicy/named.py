"""What somebody names on a command line or in a plan: in a registry, or in a module of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from kvpolicy.errors import ParameterError, UnknownNameError, near_matches
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import create

__all__ = ["is_path", "load_object", "make_policy", "policy_named", "read_settings"]


def is_path(name: str) -> bool:
    """Whether a name is ``package.module:name`` and not one of a registry.

    Parts of a policy (``linear/protect=anchors:14``) have values behind colons too.
    """
    return ":" in name and "=" not in name


def load_object(kind: str, path: str) -> Any:
    """Import ``package.module:name``.

    Args:
        kind: what it should be, for error messages (``"policy"``).
        path: where it is.

    Raises:
        ParameterError: the module can't be imported.
        UnknownNameError: it has nothing of this name; near matches are listed.
    """
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ParameterError(
            f"{kind} {path!r}: {module_name!r} can't be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        known = [known for known in vars(module) if not known.startswith("_")]
        raise UnknownNameError(
            f"{kind} {path!r}: module {module_name!r} has no {name!r}; {near_matches(name, known)}"
        )
    return getattr(module, name)


def make_policy(name: str, parameters: Mapping[str, Any] | None = None) -> EvictionPolicy:
    """Make the policy of this name.

    Args:
        name: in the registry; or ``package.module:Class``, or ``package.module:policy`` for an
            object that has its parameters already.
        parameters: of the policy.

    Raises:
        UnknownNameError: nothing has this name; near matches are listed.
        ParameterError: a module can't be imported, what it has is no policy, or a parameter is
            unknown or out of range.
    """
    parameters = dict(parameters or {})
    if not is_path(name):
        return create(name, **parameters)
    found = load_object("policy", name)
    if isinstance(found, EvictionPolicy) and not parameters:
        return found
    if isinstance(found, type) and issubclass(found, EvictionPolicy):
        return found(**parameters)
    what = "has its parameters already" if isinstance(found, EvictionPolicy) else "is no policy"
    raise ParameterError(
        f"policy {name!r}: {found!r} {what}; name a subclass of EvictionPolicy or ScoredPolicy"
    )


def policy_named(name: str, settings: Iterable[str] = ()) -> EvictionPolicy:
    """Make the policy of this name with parameters as a command line spells them.

    Example:
        >>> policy_named("linear", ["anchors=3"]).anchors
        3

    Args:
        name: as :func:`make_policy` takes it.
        settings: parameters, each ``name=value``.

    Raises:
        UnknownNameError, ParameterError: as :func:`make_policy`, or a setting is malformed.
    """
    return make_policy(name, read_settings(settings))


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
