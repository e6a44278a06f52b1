"""What an invariant is: one check of a policy on a stream, by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.testing.drive import Trace, drive
from kvpolicy.testing.failure import PolicyCheckError
from kvpolicy.testing.streams import Stream

__all__ = ["INVARIANTS", "Case", "Invariant", "applicable", "bits", "fail", "first", "register"]


class Case:
    """A policy on a stream, driven once for all checks that look at the same run.

    Args:
        policy: the policy.
        stream: the stream.
    """

    def __init__(self, policy: EvictionPolicy, stream: Stream) -> None:
        self.policy = policy
        self.stream = stream

    @cached_property
    def trace(self) -> Trace:
        """The run as the stream says."""
        with global_seed(0):
            return drive(self.policy, self.stream)

    @cached_property
    def stepwise(self) -> Trace:
        """The same run, one token a call."""
        if self.stream.calls == (1,):
            return self.trace
        return drive(self.policy, self.stream, calls=(1,))


class _Broken(Exception):
    """What a check found; :class:`Invariant` turns it into a :class:`PolicyCheckError`."""

    def __init__(
        self, trace: Trace | None, found: str, layer: int, batch: int, head: int, step: int
    ) -> None:
        super().__init__(found)
        self.trace, self.found = trace, found
        self.where = (layer, batch, head, step)


def fail(
    trace: Trace | None, found: str, *, layer: int, batch: int = 0, head: int = 0, step: int = 0
) -> NoReturn:
    """Say that a check has found the invariant broken, and where; ``head`` is a KV head."""
    raise _Broken(trace, found, layer, batch, head, step)


@dataclass(frozen=True)
class Invariant:
    """One thing that every policy is held to.

    Attributes:
        name: short name.
        words: what must hold, in words.
        check: raises if it does not.
        applies: whether a policy is held to it.
    """

    name: str
    words: str
    check: Callable[[Case], None]
    applies: Callable[[EvictionPolicy], bool]

    def __call__(self, case: Case) -> None:
        """Check one case.

        Raises:
            PolicyCheckError: the invariant is broken.
        """
        try:
            self.check(case)
        except _Broken as broken:
            layer, batch, head, step = broken.where
            where = f"layer {layer}, batch {batch}, head {head}, step {step}"
            story = "" if broken.trace is None else broken.trace.story(layer, batch, head, step)
            raise PolicyCheckError(
                self.name,
                self.words,
                repr(case.policy),
                case.stream,
                f"{where}: {broken.found}",
                story,
            ) from None


#: All invariants by name, in the order in which they are checked.
INVARIANTS: dict[str, Invariant] = {}


def _always(policy: EvictionPolicy) -> bool:
    return True


def register(
    name: str, words: str, applies: Callable[[EvictionPolicy], bool] = _always
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Add a check to :data:`INVARIANTS`; it calls :func:`fail` where its invariant is broken."""

    def add(check: Callable[[Case], None]) -> Callable[[Case], None]:
        INVARIANTS[name] = Invariant(name, words, check, applies)
        return check

    return add


def applicable(policy: EvictionPolicy) -> tuple[Invariant, ...]:
    """The invariants that this policy is held to."""
    return tuple(invariant for invariant in INVARIANTS.values() if invariant.applies(policy))


# -- what checks share -----------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """A tensor as whole numbers, in which a NaN equals itself and 0 is not -0."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def first(where: Tensor) -> list[int] | None:
    """Index of the first True, or None where there is none."""
    found = where.nonzero()
    return [int(index) for index in found[0]] if len(found) else None


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed every global generator that a policy might draw from, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
