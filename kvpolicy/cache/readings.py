"""Readings: all that an observer knows, kept aside and given back.

An observer is an object of its own making. Of its attributes, tensors and containers are copied,
generators of random numbers too, so that a random stream goes on from where it was.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheStateError
from kvpolicy.layout import TokenLayout
from kvpolicy.observers import AttentionObserver

__all__ = ["Reading", "check_readable", "copied", "give_back", "keep", "nbytes"]

#: The attributes of an observer.
Reading = dict[str, Any]

#: What can't change, or is nobody's state: kept as it is.
_KEPT = (
    *(bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device, type),
    *(FunctionType, MethodType, BuiltinMethodType, partial),
)
_COPIED = (random.Random, np.random.Generator, np.random.RandomState, np.ndarray, torch.Generator)
_CONTAINERS = (list, tuple, set, frozenset, deque)


def check_readable(observers: Sequence[AttentionObserver]) -> None:
    """Refuse observers that know something of which nobody can tell how to copy it.

    Raises:
        CacheStateError: an attribute is neither a tensor, a number or text, a generator of random
            numbers, nor a container of such.
    """
    for observer in observers:
        kind = type(observer).__name__
        if not hasattr(observer, "__dict__"):
            raise CacheStateError(f"{kind} has __slots__: what it knows can't be kept for a stage")
        for name, value in vars(observer).items():
            if not _readable(value):
                raise CacheStateError(
                    f"{kind}.{name} is a {type(value).__name__}: tokens can be staged if observers "
                    f"know tensors, numbers, text, generators of random numbers and containers of "
                    f"those, which can be copied and given back"
                )


def _readable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_readable, value.keys())) and all(map(_readable, value.values()))
    if isinstance(value, _CONTAINERS):
        return all(map(_readable, value))
    return isinstance(value, (Tensor, TokenLayout, *_KEPT, *_COPIED))


def keep(observers: Sequence[AttentionObserver], into: list[Reading] | None) -> list[Reading]:
    """What each observer knows now.

    Args:
        observers: of one layer.
        into: an older reading whose tensors may be overwritten; None for none.

    Returns:
        A reading for each observer.
    """
    if into is None or len(into) != len(observers):
        into = [{} for _ in observers]
    return [
        {name: copied(value, old.get(name)) for name, value in vars(observer).items()}
        for observer, old in zip(observers, into, strict=True)
    ]


def give_back(observers: Sequence[AttentionObserver], readings: list[Reading]) -> None:
    """Let each observer know what it knew at :func:`keep`; the readings stay as they are."""
    for observer, reading in zip(observers, readings, strict=True):
        known = vars(observer)
        for name in [name for name in known if name not in reading]:
            del known[name]
        for name, value in reading.items():
            known[name] = copied(value, known.get(name))


def nbytes(readings: list[Reading]) -> int:
    """Bytes of the tensors in them."""
    return sum(t.nbytes for reading in readings for t in reading.values() if isinstance(t, Tensor))


def copied(value: Any, into: Any) -> Any:
    """The same value, independent of the first; ``into`` is overwritten where it is alike."""
    if isinstance(value, Tensor):
        alike = (
            isinstance(into, Tensor)
            and into is not value
            and into.shape == value.shape
            and (into.dtype, into.device) == (value.dtype, value.device)
            and (torch.is_inference_mode_enabled() or not into.is_inference())
        )
        if not alike:
            with torch.inference_mode(False):  # it may be overwritten outside of this call's mode
                into = torch.empty_like(value, requires_grad=False)
        into.copy_(value.detach() if value.requires_grad else value)
        return into
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return value if isinstance(value, (TokenLayout, *_KEPT)) else copy.deepcopy(value)
