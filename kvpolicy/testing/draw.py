"""Random policies: any in the registry, with any parameters that its fields allow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.layout import RasterLayout, TextLayout, TokenLayout
from kvpolicy.parts import available_parts
from kvpolicy.parts.named import PARTS
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import CHOICES, POLICIES

__all__ = ["draw_parameters", "draw_policy"]

#: Tries until parameters must have been found that fit together.
_TRIES = 200
#: A policy that needs more than this would make streams too long to drive many of.
_MOST_BUDGET = 24
_LAYOUTS: tuple[TokenLayout, ...] = (RasterLayout(rows=64, cols=5, prefix=2), TextLayout(sinks=1))


def draw_policy(rng: random.Random, names: Sequence[str]) -> EvictionPolicy:
    """A random policy out of these names, that evicts on streams of a few dozen tokens.

    Args:
        rng: the source of chance.
        names: in the registry; ``compose`` is put together from random parts.

    Raises:
        ParameterError: no parameters were found that fit together.
    """
    name = rng.choice(list(names))
    kind = POLICIES.get(name)
    failure: Exception | None = None
    for _ in range(_TRIES):
        try:
            chosen = _choices(rng) if name == "compose" else draw_parameters(rng, kind)
            policy = kind(**chosen)
            if name == "full" or max(map(policy.min_budget, _LAYOUTS)) <= _MOST_BUDGET:
                return policy
        except (BudgetError, ParameterError) as error:
            failure = error
    raise ParameterError(f"no parameters of policy {name!r} were found that work: {failure}")


def draw_parameters(rng: random.Random, kind: type[Any]) -> dict[str, Any]:
    """Values for some of a model's fields; the others keep their defaults.

    Numbers keep to the bounds that the field has, and are small or at a bound more often than not.
    """
    schema = kind.model_json_schema()
    drawn: dict[str, Any] = {}
    for name, about in schema.get("properties", {}).items():
        if name in schema.get("required", ()) or rng.random() < 0.8:
            value = _value(rng, about)
            if value is not None:
                drawn[name] = value
    return drawn


def _value(rng: random.Random, about: dict[str, Any]) -> Any:
    """A value of a field, by its JSON schema; None for a type that is not drawn."""
    if "enum" in about:
        return rng.choice(about["enum"])
    if "anyOf" in about:
        return _value(rng, rng.choice(about["anyOf"]))
    match about.get("type"):
        case "boolean":
            return rng.random() < 0.5
        case "integer":
            low = about.get("minimum", about.get("exclusiveMinimum", -1) + 1)
            high = about.get("maximum", about.get("exclusiveMaximum", 2**31) - 1)
            reach = rng.choice((0, 2, 4, 8, 8, 40))
            return rng.randint(low, min(high, low + reach))
        case "string" if "line" in about.get("pattern", ""):
            return rng.choice(("1 line", "2 lines"))
        case "number":
            low = about.get("minimum", about.get("exclusiveMinimum", 0.0))
            high = about.get("maximum", about.get("exclusiveMaximum", low + 100.0))
            inner = rng.uniform(low, min(high, low + 100.0))
            ends = [bound for name in ("minimum", "maximum") if (bound := about.get(name))]
            return rng.choice([inner, inner, inner, *ends])
    return None


def _choices(rng: random.Random) -> dict[str, Any]:
    """Some choices made by random parts of the plainest policy or another; not all fit together."""
    chosen: dict[str, Any] = {}
    if rng.random() < 0.5:
        base = rng.choice(sorted(set(POLICIES.names()) - {"compose", "full", *POLICIES.waiting()}))
        chosen["base"] = POLICIES.get(base)(**draw_parameters(rng, POLICIES.get(base)))
    for kind in CHOICES:
        if rng.random() < (0.2 if kind == "observe" else 0.1):
            continue
        parts = []
        for _ in range(rng.choice((0, 1, 2)) if kind == "protect" else 1):
            part = PARTS[kind].get(rng.choice(available_parts(kind)))
            if {"shares", "file"} & set(part.parameters.model_fields):
                continue  # a share for each layer, or a file: the layers are not known yet
            parts.append(str(part.bind(**draw_parameters(rng, part.parameters))))
        if parts:
            chosen[kind] = "+".join(parts)
    return chosen
