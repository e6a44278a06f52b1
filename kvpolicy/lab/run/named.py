"""Things of a user's own, named ``package.module:name``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kvpolicy.errors import ParameterError, UnknownNameError, near_matches
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import create

__all__ = ["is_path", "load_object", "make_policy"]


def is_path(name: str) -> bool:
    """Whether a name is ``package.module:name`` and not one of a registry.

    Parts of a policy (``linear/protect=anchors:14``) have values behind colons too.
    """
    return ":" in name and "=" not in name


def load_object(kind: str, path: str) -> Any:
    """Import ``package.module:name``.

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
    try:
        return getattr(module, name)
    except AttributeError:
        known = [known for known in vars(module) if not known.startswith("_")]
        raise UnknownNameError(
            f"{kind} {path!r}: module {module_name!r} has no {name!r}; {near_matches(name, known)}"
        ) from None


def make_policy(name: str, parameters: dict[str, Any]) -> EvictionPolicy:
    """Make a policy from its name in the registry, or from ``package.module:Class``.

    Raises:
        UnknownNameError: no policy has this name; near matches are listed.
        ParameterError: a parameter is unknown or out of range, or the path names no policy.
    """
    if not is_path(name):
        return create(name, **parameters)
    kind = load_object("policy", name)
    if not (isinstance(kind, type) and issubclass(kind, EvictionPolicy)):
        raise ParameterError(f"policy {name!r} is {kind!r}, not a subclass of EvictionPolicy")
    return kind(**parameters)
