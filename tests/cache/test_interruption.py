"""An exception anywhere in a call: the cache goes on exactly, or says that it can't."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import kvpolicy
from kvpolicy import CacheStateError, PolicyCache
from kvpolicy.testing.faults import Interrupt, Interrupted
from kvpolicy.testing.mixed import InterruptLine

SMALL = {
    "linear": {"anchors": 2},
    "linear2d": {"anchors": 2},
    "snapkv": {"window": 2, "interval": 3, "kernel": 3},
    "pyramid": {"window": 2, "interval": 3, "kernel": 3},
    "rkv": {"window": 2, "interval": 3, "kernel": 3},
}
NAMES = [name for name in kvpolicy.available() if name != "compose"]
RASTER = kvpolicy.RasterLayout(rows=5, cols=4, prefix=1)
TEXT = kvpolicy.TextLayout(sinks=1, length=24)
LAYERS = 2
#: Interrupted everywhere: a decision a line, and one a token. The others differ from these in what
#: they reckon before anything changes; of them so many of the places, other ones for each.
EVERYWHERE = ("linear", "h2o")
SHARE = 24


class Run:
    """A stream, a cache for it, and the calls that bring it."""

    def __init__(self, name: str, layout, sizes: list[int]) -> None:
        self.policy = kvpolicy.create(name, **SMALL.get(name, {}))
        self.layout, self.sizes = layout, sizes
        self.budget = None if name == "full" else max(self.policy.min_budget(layout), 6)
        torch.manual_seed(3)
        self.query = torch.randn(LAYERS, 1, 2, sum(sizes), 4)
        self.key, self.value = torch.randn(2, LAYERS, 1, 1, sum(sizes), 4)

    def cache(self) -> PolicyCache:
        return PolicyCache(self.policy, self.budget, layout=self.layout, num_layers=LAYERS)

    def call(self, cache: PolicyCache, step: int) -> list[torch.Tensor]:
        first = sum(self.sizes[:step])
        part = slice(first, first + self.sizes[step])
        return [
            cache.attend(
                n, self.query[n, :, :, part], self.key[n, :, :, part], self.value[n, :, :, part]
            )
            for n in range(LAYERS)
        ]

    def all(self, cache: PolicyCache, first: int = 0) -> list[torch.Tensor]:
        return [out for step in range(first, len(self.sizes)) for out in self.call(cache, step)]


def places(name: str, count: int, most: int | None = None) -> range:
    """Which of a call's places are tried: no more than ``most``, others for each policy.

    Before an operation and behind it in turn, so the stride is odd.
    """
    stride = 1 if most is None else max(-(-count // most) | 1, 1)
    return range(NAMES.index(name) % stride, count, stride)


def check(
    run: Run, step: int, interrupted: Callable[[int | None], object], most: int | None
) -> None:
    """Interrupt one call at many places; None: at every one."""
    expected = run.cache()
    run.all(expected)
    begun = run.cache()
    for before in range(step):
        run.call(begun, before)
    cache = copy.deepcopy(begun)
    with interrupted(None) as counter:
        run.call(cache, step)
    assert counter.count > 0
    sizes = run.sizes
    for place in places(run.policy.key, counter.count, most):
        cache = copy.deepcopy(begun)
        with pytest.raises((Interrupted, KeyboardInterrupt)), interrupted(place):
            run.call(cache, step)
        # The last token may have been taken whole, with only its output lost: seen says so.
        taken = all(layer.seen == sum(sizes[: step + 1]) for layer in cache.layers)
        try:
            run.all(cache, step + taken)
            assert cache.seen == sum(sizes)
            if step + taken == len(sizes):  # nothing has been asked of it yet
                assert all(layer.whole for layer in cache.layers)
        except CacheStateError:
            for _ in range(2):
                with pytest.raises(CacheStateError, match=r"reset\(\)"):
                    run.call(cache, step)
            cache.reset()
            run.all(cache)
        assert_same(cache, expected, place)
        assert cache.stats() == expected.stats()


def assert_same(cache: PolicyCache, expected: PolicyCache, place: int) -> None:
    for layer in range(LAYERS):
        assert torch.equal(cache.positions(layer), expected.positions(layer)), place
        mine, theirs = cache.layers[layer].store, expected.layers[layer].store
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        for a, b in zip(
            cache.layers[layer].observers, expected.layers[layer].observers, strict=True
        ):
            assert torch.equal(a.mass, b.mass), place


#: The first tokens; a step that decides, one that does not; several tokens; a prompt too long.
CALLS = {
    "the first tokens": (RASTER, [3, 9], 0),
    "a token": (RASTER, [9] + [1] * 9, 6),
    "a line begins": (RASTER, [9] + [1] * 9, 4),
    "several tokens": (RASTER, [8, 3, 3], 1),
    "a long prompt": (TEXT, [17, 1, 1], 0),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_at_every_operation(name, call):
    """Before it and behind it in turn: behind one is before the next."""
    layout, sizes, step = CALLS[call]
    run = Run(name, layout, sizes)
    most = None if name in EVERYWHERE else SHARE
    check(run, step, lambda at: Interrupt(at, behind=bool(at and at % 2)), most)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_stage(name):
    """Three tokens are staged and two kept: both were, or none was, or the cache says so."""
    run = Run(name, RASTER, [9] + [1] * 10)
    begun = 5

    def guess(cache: PolicyCache) -> None:
        with cache.stage(4):
            for step in range(begun, begun + 3):
                run.call(cache, step)
            cache.commit(2)

    def before() -> PolicyCache:
        cache = run.cache()
        for step in range(begun):
            run.call(cache, step)
        return cache

    expected = run.cache()
    run.all(expected)
    cache = before()
    with Interrupt() as counter:
        guess(cache)
    run.all(cache, begun + 2)
    assert_same(cache, expected, -1)
    ended = {}
    for place in places(name, counter.count, 2 * SHARE):
        cache = before()
        with pytest.raises(Interrupted), Interrupt(place, behind=bool(place % 2)):
            guess(cache)
        kept = cache.seen - sum(run.sizes[:begun])
        assert kept in (0, 2)
        try:
            run.all(cache, begun + kept)
            ended[kept] = place
        except CacheStateError:
            ended["refused"] = place
            with pytest.raises(CacheStateError, match=r"reset\(\)"):
                run.call(cache, begun)
            cache.reset()
            run.all(cache)
        assert_same(cache, expected, place)
    assert 0 in ended


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["linear", "h2o", "knorm"])
def test_at_every_line(name, call):
    """Ctrl-C comes between operations, too."""
    layout, sizes, step = CALLS[call]
    check(Run(name, layout, sizes), step, InterruptLine, most=2 * SHARE)


def test_most_of_what_a_decision_asks_may_be_asked_again():
    """A policy that raises has changed nothing: the same token may come again."""
    run = Run("linear", RASTER, [9] + [1] * 12)
    cache = run.cache()
    for step in range(5):
        run.call(cache, step)
    calls = 0

    class Tired(type(run.policy)):
        def score(self, view):
            nonlocal calls
            calls += 1
            if calls == 1:
                raise MemoryError("out of memory")
            return super().score(view)

    cache.layers[0].replace_policy(Tired(**run.policy.model_dump()))
    with pytest.raises(MemoryError):
        run.call(cache, 5)
    expected = run.cache()
    run.all(expected)
    run.all(cache, 5)
    assert calls >= 2
    assert torch.equal(cache.positions(0), expected.positions(0))


def test_layers_that_disagree_are_noticed_at_the_next_call():
    run = Run("h2o", RASTER, [9] + [1] * 12)
    cache = run.cache()
    run.call(cache, 0)
    # The model fails behind layer 0, whatever the reason: layer 1 never sees this token.
    cache.attend(0, *(t[0, :, :, 9:10] for t in (run.query, run.key, run.value)))
    for layer in (0, 1):
        with pytest.raises(CacheStateError, match=r"out of turn: layers have seen \{0: 10, 1: 9\}"):
            part = slice(10, 11)
            cache.attend(
                layer,
                run.query[layer, :, :, part],
                run.key[layer, :, :, part],
                run.value[layer, :, :, part],
            )
            if layer == 1:  # it may catch up; then all agree again
                raise AssertionError
        if layer == 0:
            cache.attend(1, *(t[1, :, :, 9:10] for t in (run.query, run.key, run.value)))
            break
    cache.attend(0, *(t[0, :, :, 10:11] for t in (run.query, run.key, run.value)))


def test_nan_leaves_a_cache_that_says_so():
    """The library's own error comes when the token has been written."""
    run = Run("h2o", RASTER, [9] + [1] * 12)
    cache = run.cache()
    run.call(cache, 0)
    nan = torch.full((1, 2, 1, 4), torch.nan)
    with pytest.raises(kvpolicy.AttentionError, match=r"NaN.*reset\(\)"):
        cache.attend(0, nan, nan[:, :1], nan[:, :1])
    with pytest.raises(CacheStateError, match=r"layer 0 was interrupted.*reset\(\)"):
        run.call(cache, 1)


def test_a_compiled_step_that_breaks_off():
    run = Run("linear", RASTER, [9] + [1] * 12)
    terms: dict = {}

    def inside(cache, step, layers):
        first = sum(run.sizes[:step])
        for n in layers:
            part = slice(first, first + 1)
            cache.attend_step(
                n,
                run.query[n, :, :, part],
                run.key[n, :, :, part],
                run.value[n, :, :, part],
                **terms,
            )

    expected = run.cache()
    run.all(expected)
    # Before anything is written: as if it had not begun.
    cache = run.cache()
    for step in range(3):
        run.call(cache, step)
    with pytest.raises(KeyboardInterrupt), cache.step():
        raise KeyboardInterrupt
    run.all(cache, 3)
    assert torch.equal(cache.positions(1), expected.positions(1))
    # Behind the first layer: it has lost its place.
    cache = run.cache()
    for step in range(3):
        run.call(cache, step)
    with pytest.raises(KeyboardInterrupt), cache.step():
        inside(cache, 3, [0])
        raise KeyboardInterrupt
    with pytest.raises(CacheStateError, match="layer 0 was interrupted"):
        run.call(cache, 3)
    with pytest.raises(CacheStateError, match="layer 0 was interrupted"), cache.step():
        pass
    # Whole: the same as ever.
    cache = run.cache()
    for step in range(3):
        run.call(cache, step)
    for step in range(3, len(run.sizes)):
        with cache.step():
            inside(cache, step, range(LAYERS))
    assert torch.equal(cache.positions(1), expected.positions(1))
    assert cache.stats() == expected.stats()
