"""How arguments of the command line are spelled: lists, and names with values."""

from __future__ import annotations

import json
from typing import Any

from kvpolicy.errors import ParameterError

__all__ = ["pair", "split", "value_of", "whole_number"]


def split(text: str) -> list[str]:
    """``a, b`` as ``["a", "b"]``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def pair(text: str, option: str, example: str) -> tuple[str, Any]:
    """``images=100`` as ``("images", 100)``.

    Raises:
        ParameterError: there is no name, or no value.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ParameterError(f"{option} {text!r} is not like {example}")
    return name, value_of(value)


def value_of(text: str) -> Any:
    """A number, true, false or null where the text is one; the text itself otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def whole_number(text: str, option: str) -> int:
    """``3`` as 3.

    Raises:
        ParameterError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ParameterError(f"{option}: {text!r} is not a whole number") from None
