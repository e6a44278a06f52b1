"""How arguments of the command line are spelled: lists, and names with values."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from kvpolicy.errors import ParameterError
from kvpolicy.lab.run.plan import require_json
from kvpolicy.lab.run.runner import Stale
from kvpolicy.named import is_path

__all__ = ["STALE", "find_own", "pair", "split", "stale_from", "value_of", "whole_number"]

#: What ``--stale`` and ``--keep-stale`` say of themselves.
STALE = "What was measured by other code, versions or threads: anew, or kept as it is."


def split(text: str) -> list[str]:
    """``a, b`` as ``["a", "b"]``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def pair(text: str, option: str, example: str) -> tuple[str, Any]:
    """``images=100`` as ``("images", 100)``.

    Raises:
        ParameterError: there is no name, or no value, or one that no file could hold.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ParameterError(f"{option} {text!r} is not like {example}")
    found = value_of(value)
    try:
        require_json(found, name)
    except ValueError as error:
        raise ParameterError(f"{option} {error}") from None
    return name, found


def value_of(text: str) -> Any:
    """A number, true, false or null where the text is one; the text itself otherwise."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or digits or brackets without an end
        return text


def find_own(*names: str) -> None:
    """Let modules in the current folder be found, if one of these names asks for a module.

    The folder comes last on the path: a file there that is called as an installed package is
    never taken for it.
    """
    if any(is_path(name) for name in names) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def stale_from(flag: bool | None) -> Stale:
    """``--stale``, ``--keep-stale`` or neither, as the lab takes it."""
    if flag is None:
        return "refuse"
    return "anew" if flag else "keep"


def whole_number(text: str, option: str) -> int:
    """``3`` as 3.

    Raises:
        ParameterError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ParameterError(f"{option}: {text!r} is not a whole number") from None
