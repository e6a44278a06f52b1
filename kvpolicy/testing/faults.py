"""Invariants of a cache that is copied, saved, or interrupted in the middle of a call."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.errors import CacheStateError, ParameterError
from kvpolicy.testing.invariants.invariant import Case, bits, fail, register

__all__ = ["Interrupt", "Interrupted"]


class Interrupted(Exception):
    """What :class:`Interrupt` raises."""


class Interrupt(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises before or behind one of torch's operations, counted from the beginning of a block.

    Args:
        at: the operation, counted from 0; None to count them only.
        behind: whether the operation has run when it is interrupted.
    """

    def __init__(self, at: int | None = None, *, behind: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = at
        self.behind = behind
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count the operation, and raise if it is the one."""
        here = self.count == self.at
        self.count += 1
        if here and not self.behind:
            raise Interrupted(f"before {func}")
        result = func(*args, **(kwargs or {}))
        if here:
            raise Interrupted(f"behind {func}")
        return result


class _Feed:
    """Brings a stream's tokens to a cache, call by call, to one layer after the other."""

    def __init__(self, case: Case) -> None:
        stream = case.stream
        self.case, self.stream = case, stream
        self.tokens = case.trace.tokens
        self.sizes = stream.sizes()

    def cache(self) -> PolicyCache:
        return self.stream.cache(self.case.policy)

    def call(self, cache: PolicyCache, step: int) -> list[Tensor]:
        """The outputs of one call in each layer."""
        first = sum(self.sizes[:step])
        return self.tokens.bring(cache, slice(first, first + self.sizes[step]))

    def calls(self, cache: PolicyCache, steps: range) -> list[list[Tensor]]:
        """The outputs of several calls."""
        return [self.call(cache, step) for step in steps]

    def differs(self, cache: PolicyCache, other: PolicyCache) -> int | None:
        """The first layer that holds something else; None if all are the same."""
        for layer in range(self.stream.layers):
            mine, theirs = (each.layers[layer].require_store() for each in (cache, other))
            same = torch.equal(mine.positions, theirs.positions) and all(
                torch.equal(bits(a), bits(b))
                for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values))
            )
            if not same:
                return layer
        return None


def _same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    """Whether all outputs agree, bit for bit."""
    return all(
        torch.equal(bits(a), bits(b))
        for calls in zip(one, other, strict=True)
        for a, b in zip(*calls, strict=True)
    )


@register("copies", "a deep copy, and a cache loaded from a saved one, go on as the original does.")
def _copies(case: Case) -> None:
    feed = _Feed(case)
    half = len(feed.sizes) // 2
    cache, loaded = feed.cache(), feed.cache()
    feed.calls(cache, range(half))
    others = {"a deep copy": copy.deepcopy(cache)}
    try:
        file = io.BytesIO()
        torch.save(cache.state_dict(), file)
    except ParameterError:  # an observer of a third party that says it can't be written down
        pass
    else:
        loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        others["a cache loaded from a file"] = loaded
    rest = range(half, len(feed.sizes))
    expected = feed.calls(cache, rest)
    for name, other in others.items():
        try:
            same = _same(feed.calls(other, rest), expected)
        except Exception as error:  # the original went on without one
            raised = f"{type(error).__name__}: {error}"
            fail(
                case.trace,
                f"{name} made before step {half} raised {raised} where the original goes on",
                layer=0,
                step=half,
            )
        layer = feed.differs(other, cache) if feed.sizes else None
        if not same or layer is not None:
            fail(
                case.trace,
                f"{name} made before step {half} goes on otherwise",
                layer=layer or 0,
                step=half,
            )
        if other.stats() != cache.stats():
            fail(case.trace, f"{name} has other stats", layer=0, step=half)


@register(
    "interruption",
    "after an exception in a call the cache goes on exactly, or every call says that it can't.",
)
def _interruption(case: Case) -> None:
    feed = _Feed(case)
    step = case.stream.seed % len(feed.sizes)
    counted = feed.cache()
    expected = feed.calls(counted, range(step))
    with Interrupt() as counter:
        expected.append(feed.call(counted, step))
    expected += feed.calls(counted, range(step + 1, len(feed.sizes)))
    at, behind = divmod(case.stream.seed * 7919 % (2 * counter.count), 2)
    cache = feed.cache()
    outputs = feed.calls(cache, range(step))
    try:
        with Interrupt(at, behind=bool(behind)):
            feed.call(cache, step)
    except Interrupted as error:
        where = f"an exception {error} in step {step}"
    else:
        fail(case.trace, f"step {step} had {counter.count} operations, and then fewer", layer=0)
    # The call's tokens may have been taken whole, with only the output lost: ``seen`` says so.
    end = sum(feed.sizes[: step + 1])
    taken = all(layer.whole and layer.seen == end for layer in cache.layers)
    outputs += expected[step : step + taken]
    try:
        outputs += feed.calls(cache, range(step + taken, len(feed.sizes)))
    except CacheStateError as refused:
        if "reset()" not in str(refused):
            fail(case.trace, f"after {where} it does not say what to do: {refused}", layer=0)
        try:
            feed.call(cache, step)
        except CacheStateError:
            pass
        else:
            fail(case.trace, f"after {where} it refused one call, and took the next", layer=0)
        cache.reset()
        outputs = feed.calls(cache, range(len(feed.sizes)))
    except Exception as error:
        fail(case.trace, f"after {where} it raised {type(error).__name__}: {error}", layer=0)
    layer = feed.differs(cache, counted)
    if layer is not None or not _same(outputs, expected):
        fail(case.trace, f"after {where} it went on otherwise", layer=layer or 0, step=step)
