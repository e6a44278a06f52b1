"""Generations in which everything happens at once, for the fuzz.

Copies, saved files, exceptions, masks, batches put into another order and tokens that are taken
back, at random between and within the calls of one stream. A cache to which nothing of this
happens gets the same calls afterwards, and must hold the same, bit for bit.
"""

from __future__ import annotations

import copy
import io
import random
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

import kvpolicy
from kvpolicy.cache.cache import PolicyCache
from kvpolicy.errors import CacheStateError, LayoutError, ParameterError
from kvpolicy.testing.faults import Interrupt, Interrupted
from kvpolicy.testing.invariants.invariant import Case, Invariant, bits, fail
from kvpolicy.testing.masks import drawn_mask

__all__ = ["Happened", "InterruptLine", "check_mixed"]

_HOUSE = str(Path(kvpolicy.__file__).parent)


@dataclass
class Happened:
    """How often what happened.

    Attributes:
        exceptions: calls that were interrupted.
        refusals: after how many of them the cache said that it can't go on.
        copies: caches that went on as copies, or from a file.
        masks: calls with a mask of their own.
        commits: times that tokens were taken back.
    """

    exceptions: int = 0
    refusals: int = 0
    copies: int = 0
    masks: int = 0
    commits: int = 0


class InterruptLine:
    """Raises KeyboardInterrupt at one of the lines of kvpolicy that run, as Ctrl-C would.

    Args:
        at: which, counted from 0; None to count them only.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.count = 0

    def __enter__(self) -> InterruptLine:
        sys.settrace(self._call)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_HOUSE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count - 1 == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@dataclass(frozen=True)
class _Call:
    """Some tokens of the stream that come together."""

    first: int
    size: int
    masked: bool


class _Mixture:
    """One generation; all that happens follows from the stream."""

    def __init__(self, case: Case) -> None:
        stream = case.stream
        self.case, self.stream = case, stream
        self.chance = random.Random(stream.seed)
        self.tokens = stream.draw()
        self.visible = drawn_mask(stream)
        self.happened = Happened()
        self.cache = self.fresh()
        self.came: list[_Call] = []
        #: What each of these calls gave; None where an exception took it.
        self.gave: list[list[Tensor] | None] = []

    def fresh(self) -> PolicyCache:
        return self.stream.cache(self.case.policy)

    def bring(self, cache: PolicyCache, call: _Call) -> list[Tensor]:
        part = slice(call.first, call.first + call.size)
        visible = None
        if call.masked:  # without blocks, which may need more room than the budget gives
            visible = self.visible[:, :, part, : part.stop].tril(call.first)
        return self.tokens.bring(cache, part, visible)

    def take(self, call: _Call) -> None:
        """Bring a call's tokens, and write down that they came."""
        self.gave.append(self.bring(self.cache, call))
        self.came.append(call)

    def run(self) -> None:
        first = 0
        for size in self.stream.sizes():
            masked = self.chance.random() < 0.2
            self.happened.masks += masked
            call = _Call(first, size, masked)
            first += size
            if self.chance.random() < 0.15:
                self.cache = self.another()
            if self.chance.random() < 0.1 and self.came:
                self.shuffle()
            if self.chance.random() < 0.2 and call.first:  # a prompt may have to be compressed
                self.guess(call)
            elif self.chance.random() < 0.2:
                self.interrupt(call)
            else:
                self.take(call)
        self.compare()

    def guess(self, call: _Call) -> None:
        """Stage a call's tokens until all of them have been kept, some at a time."""
        first, end = call.first, call.first + call.size
        while first < end:
            count = self.chance.randint(1, end - first)
            kept = self.chance.randint(0, count)
            broken = self.chance.randrange(400) if self.chance.random() < 0.2 else None
            with (
                suppress(Interrupted),
                self.cache.stage(count + self.chance.randint(0, 3)),
                Interrupt(broken),
            ):
                some = self.chance.randint(1, count)
                self.bring(self.cache, _Call(first, some, call.masked))
                if some < count:
                    self.bring(self.cache, _Call(first + some, count - some, call.masked))
                self.cache.commit(kept)
                self.happened.commits += 1
                if first + kept < end and self.chance.random() < 0.3:  # more, which are forgotten
                    self.bring(self.cache, _Call(first + kept, 1, call.masked))
            layers = self.cache.layers
            done = self.cache.seen - first
            if not all(layer.whole and layer.seen == first + done for layer in layers):
                # What is staged is forgotten after an exception; but this one broke off a commit.
                self.refused(_Call(first, 1, call.masked), "an exception in commit()")
                done = 0
            self.came += [_Call(first + token, 1, call.masked) for token in range(done)]
            self.gave += [None] * done
            first += done

    def another(self) -> PolicyCache:
        """A cache that goes on instead of this one, whatever becomes of this one."""
        self.happened.copies += 1
        if self.chance.random() < 0.5:
            return self.copied()
        try:
            file = io.BytesIO()
            torch.save(self.cache.state_dict(), file)
        except ParameterError:  # an observer of a third party that says it can't be written down
            return self.copied()
        loaded = self.fresh()
        loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        return loaded

    def copied(self) -> PolicyCache:
        """A deep copy; and the original meets tokens that are not the stream's."""
        found = copy.deepcopy(self.cache)
        if self.came:
            size = self.came[-1].size
            with suppress(LayoutError):  # behind the layout's last token no others fit
                self.bring(self.cache, _Call(self.came[-1].first, size, masked=False))
        return found

    def shuffle(self) -> None:
        """Put the batch into another order, and back."""
        order = list(range(self.stream.batch))
        self.chance.shuffle(order)
        index = torch.tensor(order, dtype=torch.int64)
        self.cache.select_batch(index)
        self.cache.select_batch(index.argsort())

    def interrupt(self, call: _Call) -> None:
        """Raise somewhere in a call: it comes again, or has come, or the cache can't go on."""
        self.happened.exceptions += 1
        by_line = self.chance.random() < 0.3
        # Counted on a copy: what happens at a place must not have happened before.
        trial = copy.deepcopy(self.cache)
        counter: InterruptLine | Interrupt = InterruptLine() if by_line else Interrupt()
        with counter:
            self.bring(trial, call)
        at = self.chance.randrange(counter.count)
        behind = self.chance.random() < 0.5
        try:
            with InterruptLine(at) if by_line else Interrupt(at, behind=behind):
                self.bring(self.cache, call)
        except (Interrupted, KeyboardInterrupt) as error:
            where = (
                f"an exception {error}{f' at line {at}' * by_line} in the call from {call.first}"
            )
        else:
            fail(self.case.trace, f"a call from {call.first} took another way", layer=0)
        end = call.first + call.size
        layers = self.cache.layers
        if all(layer.whole and layer.seen == end for layer in layers):
            # The tokens have been taken whole, and only the output is lost.
            self.came.append(call)
            self.gave.append(None)
            return
        try:
            self.take(call)
            return
        except CacheStateError as refused:
            if "reset()" not in str(refused):
                fail(
                    self.case.trace, f"after {where} it does not say what to do: {refused}", layer=0
                )
        except Exception as error:
            fail(
                self.case.trace, f"after {where} it raised {type(error).__name__}: {error}", layer=0
            )
        self.refused(call, where)
        self.take(call)

    def refused(self, call: _Call, where: str) -> None:
        """See that a cache which can't go on takes no call; then begin anew with what came."""
        self.happened.refusals += 1
        try:
            self.bring(self.cache, call)
        except CacheStateError:
            pass
        else:
            fail(self.case.trace, f"after {where} it takes calls that it can't serve", layer=0)
        self.cache.reset()
        for before in self.came:
            self.bring(self.cache, before)

    def compare(self) -> None:
        """With a cache to which nothing happened."""
        plain = self.fresh()
        for call, gave in zip(self.came, self.gave, strict=True):
            expected = self.bring(plain, call)
            if gave is None:
                continue
            for layer, (mine, other) in enumerate(zip(gave, expected, strict=True)):
                if not torch.equal(bits(mine), bits(other)):
                    fail(self.case.trace, f"another output from {call.first} on", layer=layer)
        for layer in range(self.stream.layers):
            ours, theirs = (each.layers[layer].require_store() for each in (self.cache, plain))
            for name in ("positions", "keys", "values"):
                if not torch.equal(bits(getattr(ours, name)), bits(getattr(theirs, name))):
                    fail(self.case.trace, f"other {name} are cached", layer=layer)
        # What a stage keeps aside stays allocated, and what was staged and kept stays counted.
        told = replace(self.cache.stats(), staging_bytes=0, passes=0, staged=0, accepted=0)
        if told != plain.stats():
            fail(self.case.trace, "other stats", layer=0)


def check_mixed(case: Case) -> Happened:
    """Run one generation in which everything happens, and say what did.

    Raises:
        PolicyCheckError: the cache is not what it would be if nothing had happened.
    """
    mixture = _Mixture(case)
    Invariant(
        "mixed",
        "copies, files, exceptions, masks, reordered batches and taken back tokens leave no trace.",
        lambda case: mixture.run(),
        lambda policy: True,
    )(case)
    return mixture.happened
