"""The argument in which models of transformers take their cache, whatever a version calls it.

It is ``cache`` since transformers 5.24 and was ``past_key_values`` before, which 6.0 will refuse. A
call's cache is therefore recognised by what it is, never by the name that it came under.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpolicy import ParameterError

__all__ = ["CACHE_ARGUMENT", "as_argument", "brings", "either", "given_cache"]

#: What the installed transformers calls it: the name of the field of a model's output.
CACHE_ARGUMENT = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)


def as_argument(cache: Cache | None) -> dict[str, Any]:
    """A cache under the name of the installed version: ``model(ids, **as_argument(cache))``."""
    return {CACHE_ARGUMENT: cache}


def given_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a call; None where there is none."""
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, Cache)), None)


def brings(cache: Cache, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call brings this very cache."""
    return any(value is cache for value in (*args, *kwargs.values()))


def either(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache of a call that may come under today's name or under the former one.

    Raises:
        ParameterError: two caches are given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ParameterError("give one cache: cache=..., or past_key_values=..., its former name")
    return past_key_values if cache is None else cache
