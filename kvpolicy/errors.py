"""Every exception that kvpolicy raises on purpose.

Each one also derives from the built-in exception that fits, so that callers who know nothing of
kvpolicy can still catch ``ValueError`` or ``LookupError``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError

__all__ = [
    "AttentionError",
    "BudgetError",
    "CacheStateError",
    "KVPolicyError",
    "KernelError",
    "LayoutError",
    "ModelError",
    "ParameterError",
    "RunFolderError",
    "ShapeError",
    "UnknownNameError",
    "first_line",
    "near_matches",
    "parameter_error",
]


class KVPolicyError(Exception):
    """Base class of all errors raised by kvpolicy."""


class ParameterError(KVPolicyError, ValueError):
    """A policy, schedule or layout parameter is missing, unknown or out of range."""


class BudgetError(KVPolicyError, ValueError):
    """A budget can't be parsed, or is smaller than the policy needs for this layout."""


class LayoutError(KVPolicyError, ValueError):
    """Tokens don't fit the layout, or the layout lacks what the policy needs."""


class ShapeError(KVPolicyError, ValueError):
    """A tensor has the wrong shape, device or dtype."""


class CacheStateError(KVPolicyError, RuntimeError):
    """Calls came in an order, or with a batch, that the cache can't serve."""


class AttentionError(KVPolicyError, FloatingPointError):
    """Attention gave NaN: decisions made from it would be meaningless."""


class KernelError(KVPolicyError, RuntimeError):
    """The CPU kernel can't be built or loaded; the message says what the compiler said."""


class ModelError(KVPolicyError, TypeError):
    """A model can't be put under a policy; the message says why, and what would serve it."""


class RunFolderError(KVPolicyError, OSError):
    """The folder of a run can't be written: a full disk, or another run at work in it."""


class UnknownNameError(KVPolicyError, LookupError):
    """A name is not in a registry; the message lists near matches."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its kind, of one that says nothing."""
    return next(iter(str(error).splitlines()), "").strip() or type(error).__name__


def near_matches(name: str, known: Iterable[str]) -> str:
    """Say which of the known names the caller may have meant.

    Returns:
        A clause such as ``did you mean 'linear'? known: 'full', 'linear'``.
    """
    names = sorted(known)
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    listed = ", ".join(repr(n) for n in names) or "nothing"
    if not close:
        return f"known: {listed}"
    return f"did you mean {' or '.join(repr(n) for n in close)}? known: {listed}"


def parameter_error(name: str, model: type[BaseModel], error: ValidationError) -> ParameterError:
    """Say which parameter is wrong and why, in one line.

    Args:
        name: what the user calls the thing, e.g. ``policy 'linear'``.
        model: its class.
        error: what pydantic found; the first complaint counts.
    """
    first = error.errors()[0]
    if not first["loc"]:
        return ParameterError(f"{name}: {first['msg'].removeprefix('Value error, ')}")
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = near_matches(field, model.model_fields)
        return ParameterError(f"{name} has no parameter {field!r}: {known}")
    about = model.model_fields[field].description
    about = f" ({about})" if about else ""
    if first["type"] == "missing":
        return ParameterError(f"{name}: {field} is missing{about}")
    path = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    return ParameterError(f"{name}: {path}={first['input']!r}: {said}{about}")
