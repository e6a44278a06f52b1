"""The invariant of staging: tokens that are taken back have never come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.cache.layer import Layer
from kvpolicy.errors import CacheStateError
from kvpolicy.testing.invariants.invariant import Case, bits, fail, register
from kvpolicy.testing.streams import Stream, Tokens

__all__ = ["difference"]

#: Commits on one stream.
_ROUNDS = 4
#: Most tokens that are staged at once.
_MOST = 12
#: Seeds of the tokens that are taken back; beyond those that streams draw.
_LOST = 2**21


def difference(cache: PolicyCache, other: PolicyCache) -> tuple[int, str] | None:
    """The first layer in which two caches differ, and in what; None if they are the same.

    All that they know is compared, bit for bit, but for what stages have allocated.
    """
    for one, two in zip(cache.layers, other.layers, strict=True):
        ours, theirs = dict(_known(one)), dict(_known(two))
        for name in sorted(ours.keys() | theirs.keys()):
            if not _alike(ours.get(name), theirs.get(name)):
                return one.plan.layer, name
    return None


def _known(layer: Layer) -> Iterator[tuple[str, Any]]:
    """All that a layer knows, by names that say where it stands."""
    yield "whole", layer.whole
    for name, value in layer.books._asdict().items():
        if name not in ("store", "observers"):
            yield name, value
    store = layer.store
    if store is not None:
        yield from store.books._asdict().items()
        yield from (("keys", store.keys), ("values", store.values), ("positions", store.positions))
    for observer in layer.observers:
        for name, value in vars(observer).items():
            yield f"{type(observer).__name__}.{name}", value


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same; tensors bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        floats = one.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return same and torch.equal(*((bits(one), bits(other)) if floats else (one, other)))
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if isinstance(one, random.Random) and isinstance(other, random.Random):
        return one.getstate() == other.getstate()
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if callable(one) and callable(other):
        return True  # functions, which know nothing themselves
    return bool(one == other)


def _mixed(kept: Tokens, lost: Tokens, at: int) -> Tokens:
    """Other tokens from position ``at`` on."""
    pairs = ((kept.query, lost.query), (kept.key, lost.key), (kept.value, lost.value))
    return Tokens(*(torch.cat([a[..., :at, :], b[..., at:, :]], dim=3) for a, b in pairs))


@register(
    "rollback",
    "staged tokens that are not committed have never come: whatever they were, all that the cache "
    "knows is bit for bit what it is when only the others come, one by one.",
)
def _rollback(case: Case) -> None:
    stream: Stream = case.stream
    rng = random.Random(stream.seed)
    tokens, lost = case.trace.tokens, stream.draw(_LOST + stream.seed)
    staged, alone = (stream.cache(case.policy) for _ in range(2))
    # A text's first call may bring more than fits, and is compressed.
    at = rng.randint(1 if stream.layout.compresses_prompt else 0, stream.tokens)
    for cache in (staged, alone):
        if at:
            tokens.bring(cache, slice(at))
    lookahead = rng.choice((1, 2, min(stream.layout.line_length + 1, _MOST), _MOST))
    with ExitStack() as stack:
        try:
            stack.enter_context(staged.stage(lookahead))
        except CacheStateError:  # an observer of a third party that knows what can't be copied
            return
        for turn in range(_ROUNDS):
            most = min(lookahead, stream.tokens - at)
            kept = rng.randint(0, most)
            gone = rng.randint(0, most - kept)
            outputs = _staged(staged, _mixed(tokens, lost, at + kept), at, kept + gone, rng)
            staged.commit(kept)
            expected = [
                tokens.bring(alone, slice(at + done, at + done + 1)) for done in range(kept)
            ]
            where = f"of {kept + gone} tokens staged behind {at}, {kept} were committed"
            at += kept
            found = difference(staged, alone)
            if found is not None:
                fail(case.trace, f"{where}; {found[1]} is not as without", layer=found[0])
            if not _same(outputs[:kept], expected):
                fail(case.trace, f"{where}; the output of commit {turn} is another", layer=0)
        _staged(staged, lost, at, min(lookahead, stream.tokens - at), rng)
    # What comes next is what would have come.
    count = min(2 * _MOST, stream.tokens - at)
    rest = slice(at, at + count)
    if count and not _same(*([tokens.bring(cache, rest)] for cache in (staged, alone))):
        fail(case.trace, f"behind a stage at position {at} the output is another", layer=0)
    found = difference(staged, alone)
    if found is not None:
        fail(case.trace, f"behind a stage, {found[1]} is not as without one", layer=found[0])


def _same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    """Whether all outputs agree, bit for bit."""
    return all(
        torch.equal(bits(a), bits(b))
        for calls in zip(one, other, strict=True)
        for a, b in zip(*calls, strict=True)
    )


def _staged(
    cache: PolicyCache, tokens: Tokens, first: int, count: int, rng: random.Random
) -> list[list[Tensor]]:
    """The outputs of staged tokens, token by token, in calls of one size or another."""
    size = rng.choice((1, 2, max(count, 1)))
    outputs: list[list[Tensor]] = []
    for done in range(0, count, size):
        brought = min(size, count - done)
        of_layers = tokens.bring(cache, slice(first + done, first + done + brought))
        outputs += [[out[:, :, i : i + 1] for out in of_layers] for i in range(brought)]
    return outputs
