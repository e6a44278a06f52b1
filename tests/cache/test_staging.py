"""Staging: what is taken back leaves no trace, and what stays is what it would be without."""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import (
    BudgetError,
    CacheStateError,
    CumulativeMass,
    ParameterError,
    PolicyCache,
    RasterLayout,
    TextLayout,
)
from kvpolicy.testing.rollback import difference

SMALL = {
    "linear": {"anchors": 3},
    "linear2d": {"anchors": 3},
    "pyramid": {"window": 2, "interval": 3},
    "snapkv": {"window": 2, "interval": 3},
    "rkv": {"window": 2, "interval": 3},
    "ssd": {"window": 3},
}
RASTER = RasterLayout(rows=9, cols=4, prefix=2, line_break=1)
TEXT = TextLayout(sinks=1, length=60)
TOKENS, LAYERS, BATCH, HEADS, GROUP, DIM = 40, 2, 2, 2, 2, 4


def policy(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **SMALL.get(name, {}))


def make(name: str, layout=RASTER, budget: int = 12, **options) -> PolicyCache:
    made = policy(name)
    floor = made.min_budget(layout)
    return PolicyCache(made, max(floor, budget), layout=layout, num_layers=LAYERS, **options)


def draw(seed: int = 0, tokens: int = TOKENS):
    """Queries, keys and values of a whole stream, ``[layers, B, heads, T, D]``."""
    chance = torch.Generator().manual_seed(seed)
    heads = (HEADS * GROUP, HEADS, HEADS)
    return [torch.randn(LAYERS, BATCH, n, tokens, DIM, generator=chance) for n in heads]


def feed(cache: PolicyCache, tensors, first: int, count: int, **terms) -> torch.Tensor:
    """Bring some tokens in one call of each layer; their outputs."""
    part = slice(first, first + count)
    return torch.stack(
        [
            cache.attend(layer, *(t[layer, :, :, part] for t in tensors), **terms)
            for layer in range(LAYERS)
        ]
    )


def same(cache: PolicyCache, other: PolicyCache) -> bool:
    """Whether two caches know the same, but for what stages have allocated and counted."""
    counted = {"staging_bytes": 0, "passes": 0, "staged": 0, "accepted": 0}
    stats = [replace(c.stats(), **counted) for c in (cache, other)]
    return stats[0] == stats[1] and difference(cache, other) is None


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_what_is_committed_is_all_that_came(data):
    """Any policy, layout, way to reclaim, lookahead and cuts, with beams reordered between them."""
    name = data.draw(st.sampled_from(kvpolicy.available()), label="policy")
    layout = data.draw(st.sampled_from([RASTER, TEXT]), label="layout")
    reclaim = data.draw(st.sampled_from(["lazy", "eager"]), label="reclaim")
    lookahead = data.draw(st.sampled_from([1, 2, 5, 9, 30]), label="lookahead")
    rng = random.Random(data.draw(st.integers(0, 2**16), label="seed"))
    tensors, junk = draw(rng.randrange(99)), draw(99 + rng.randrange(99))
    budget = 60 if name == "full" else 12
    staged, alone = (make(name, layout, budget, reclaim=reclaim) for _ in range(2))
    # A text's prompt may be longer than the slots, and is compressed.
    at = rng.choice([0, 3, 17] if layout is RASTER else [3, 17])
    for cache in (staged, alone):
        if at:
            feed(cache, tensors, 0, at)
    with staged.stage(lookahead):
        while at < TOKENS:
            kept = rng.randint(0, min(lookahead, TOKENS - at))
            lost = rng.randint(0, min(lookahead - kept, TOKENS - at - kept))
            run = [
                torch.cat([t[..., : at + kept, :], j[..., at + kept :, :]], 3)
                for t, j in zip(tensors, junk, strict=True)
            ]
            for first, count in cut(rng, at, kept + lost):
                outputs = feed(staged, run, first, count)
            staged.commit(kept)
            for position in range(at, at + kept):
                output = feed(alone, tensors, position, 1)
            if kept and not lost:
                assert torch.equal(outputs[..., -1:, :], output)
            at += kept
            assert staged.staged == 0
            assert same(staged, alone)
            if rng.random() < 0.2 and staged.batch is not None:
                index = torch.tensor([rng.randrange(BATCH) for _ in range(BATCH)])
                tensors, junk = ([t[:, index] for t in some] for some in (tensors, junk))
                for cache in (staged, alone):
                    cache.select_batch(index)
    assert same(staged, alone)


def cut(rng: random.Random, first: int, count: int):
    """Calls that bring ``count`` tokens: at once, one by one, or by twos."""
    size = rng.choice([1, 2, count or 1])
    for begin in range(0, count, size):
        yield first + begin, min(size, count - begin)


@pytest.mark.parametrize("name", kvpolicy.available())
def test_what_is_forgotten_leaves_no_trace(name):
    """Whatever the tokens that go: also where a stage is left by an exception in a layer."""
    tensors, junk = draw(), draw(1)
    cache, alone = make(name, budget=50), make(name, budget=50)
    for each in (cache, alone):
        feed(each, tensors, 0, 20)
    with cache.stage(9):
        feed(cache, junk, 20, 9)
    assert same(cache, alone)
    with suppress(ZeroDivisionError), cache.stage(9):
        feed(cache, junk, 20, 3)
        cache.attend(0, *(t[0, :, :, 23:25] for t in junk))
        raise ZeroDivisionError
    assert same(cache, alone)
    assert torch.equal(feed(cache, tensors, 20, 12), feed(alone, tensors, 20, 12))


def test_an_interrupted_layer_is_as_it_was():
    """NaN that an observer would have seen: the call raises, and commit(0) brings all back."""
    tensors = draw()
    cache, alone = make("h2o"), make("h2o")
    for each in (cache, alone):
        feed(each, tensors, 0, 20)
    broken = [t.clone() for t in tensors]
    broken[0][:, :, :, 22] = torch.nan
    with cache.stage(9):
        with pytest.raises(kvpolicy.AttentionError):
            feed(cache, broken, 20, 5)
        with pytest.raises(CacheStateError, match="interrupted"):
            feed(cache, tensors, 20, 1)
        with pytest.raises(CacheStateError, match="interrupted"):
            cache.commit(1)
        cache.commit(0)
        assert same(cache, alone)
        feed(cache, tensors, 20, 5)
        cache.commit(5)
    for position in range(20, 25):
        feed(alone, tensors, position, 1)
    assert same(cache, alone)


def test_a_block_of_position_queries_leaves_no_trace():
    """Tokens that see each other and all that is cached, and are all forgotten."""
    tensors = draw()
    cache, alone = make("linear", budget=24), make("linear", budget=24)
    for each in (cache, alone):
        feed(each, tensors, 0, 25)
    visible = torch.ones(1, 1, 4, 29, dtype=torch.bool)
    with cache.stage(4):
        for _ in range(2):
            feed(cache, tensors, 25, 4, visible=visible)
            with pytest.raises(CacheStateError, match="stay or go together"):
                cache.commit(2)
            cache.commit(0)
            assert same(cache, alone)
        feed(cache, tensors, 25, 4, visible=visible)
        cache.commit(4)
    feed(alone, tensors, 25, 4, visible=visible)
    assert same(cache, alone)


def test_padding_in_a_text():
    """Tokens that see nothing hold no slot; taken back, they have held none."""
    tensors = draw()
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().repeat(BATCH, 1, 1, 1)
    mask[0, :, :, [0, 1, 22, 23]] = False
    cache, alone = make("h2o", TEXT), make("h2o", TEXT)
    for each in (cache, alone):
        feed(each, tensors, 0, 20, visible=mask[:, :, :20, :20])
    with cache.stage(6):
        for kept in (3, 0, 2):
            at = cache.seen
            feed(cache, tensors, at, 6, visible=mask[:, :, at : at + 6, : at + 6])
            cache.commit(kept)
            for position in range(at, at + kept):
                rows = mask[:, :, position : position + 1, : position + 1]
                feed(alone, tensors, position, 1, visible=rows)
            assert same(cache, alone)


def test_a_refused_block_is_taken_back_with_its_decision():
    tensors = draw()
    cache, alone = make("linear", budget=16), make("linear", budget=16)
    for each in (cache, alone):
        feed(each, tensors, 0, 22)
    with cache.stage(16):
        feed(cache, tensors, 22, 1)
        visible = torch.ones(1, 1, 15, 38, dtype=torch.bool)
        with pytest.raises(BudgetError, match="see each other"):
            feed(cache, tensors, 23, 15, visible=visible)
        cache.commit(1)
        feed(alone, tensors, 22, 1)
        assert same(cache, alone)


class Rolls(CumulativeMass):
    """An observer that draws: what it reads is mass times a random number."""

    def __init__(self, shape):
        super().__init__(shape)
        self.dice = random.Random(0)
        self.stream = torch.Generator().manual_seed(0)
        self.drawn: list[float] = []

    def observe(self, report):
        self.drawn.append(self.dice.random() + float(torch.rand((), generator=self.stream)))
        super().observe(report)
        self.mass *= self.drawn[-1]


class Dice(kvpolicy.ScoredPolicy):
    def observers(self, shape):
        return (Rolls(shape),)

    def score(self, view):
        return view.mass


def test_random_streams_and_containers_of_observers_are_given_back():
    tensors, junk = draw(), draw(1)
    caches = [PolicyCache(Dice(), 9, layout=RASTER, num_layers=LAYERS) for _ in range(2)]
    for each in caches:
        feed(each, tensors, 0, 15)
    with caches[0].stage(8):
        for kept in (3, 0, 5):
            at = caches[0].seen
            mixed = [
                torch.cat([t[..., : at + kept, :], j[..., at + kept :, :]], 3)
                for t, j in zip(tensors, junk, strict=True)
            ]
            feed(caches[0], mixed, at, 8)
            caches[0].commit(kept)
            for position in range(at, at + kept):
                feed(caches[1], tensors, position, 1)
            for one, other in zip(*(cache.layers for cache in caches), strict=True):
                (a,), (b,) = one.observers, other.observers
                assert torch.equal(a.mass, b.mass)
                assert a.drawn == b.drawn
                assert a.dice.getstate() == b.dice.getstate()
                assert torch.equal(a.stream.get_state(), b.stream.get_state())


class Keeper(CumulativeMass):
    def __init__(self, shape):
        super().__init__(shape)
        self.friend = object()


class Keeps(Dice):
    def observers(self, shape):
        return (Keeper(shape),)


def test_what_is_refused():
    tensors = draw()
    cache = make("h2o")
    with pytest.raises(CacheStateError, match="outside"):
        cache.commit(0)
    for wrong in (0, -1, True, 2.0, "4"):
        with pytest.raises(ParameterError, match="lookahead"), cache.stage(wrong):
            pass
    feed(cache, tensors, 0, 12)
    with pytest.raises(CacheStateError, match="has begun"), cache.stage(3), cache.stage(3):
        pass
    with cache.stage(3):
        with pytest.raises(CacheStateError, match="lookahead of 3"):
            feed(cache, tensors, 12, 4)
        assert cache.staged == 0
        feed(cache, tensors, 12, 2)
        assert cache.staged == 2
        for wrong in (-1, 3, True, 1.0):
            with pytest.raises(ParameterError, match="from 0 to 2"):
                cache.commit(wrong)
        with pytest.raises(CacheStateError, match="saved"):
            cache.state_dict()
        with pytest.raises(CacheStateError, match="copied"):
            copy.deepcopy(cache)
        with pytest.raises(CacheStateError, match="reordered"):
            cache.select_batch(torch.tensor([0]))
        with pytest.raises(CacheStateError, match="compiled step"), cache.step():
            pass
        cache.attend(0, *(t[0, :, :, 14:15] for t in tensors))
        with pytest.raises(CacheStateError, match="out of turn"):
            cache.commit(1)
        cache.commit(0)
        assert cache.seen == 12
    empty = make("h2o", TEXT)
    with pytest.raises(CacheStateError, match="prompt before the stage"), empty.stage(30):
        feed(empty, tensors, 0, 20)
    other = PolicyCache(Keeps(), 9, layout=RASTER, num_layers=LAYERS)
    feed(other, tensors, 0, 3)
    with pytest.raises(CacheStateError, match=r"Keeper\.friend is a object"), other.stage(2):
        pass
    feed(other, tensors, 3, 1)
    only = PolicyCache(Keeps(), 9, layout=RASTER, num_layers=1)
    with only.stage(2, sure=5):
        for first, count in ((0, 6), (5, 1), (5, 1)):  # none is taken for sure in silence
            with pytest.raises(CacheStateError, match=r"Keeper\.friend is a object"):
                only.attend(0, *(t[0, :, :, first : first + count] for t in tensors))
    assert only.seen == 5


def test_copies_and_saves_inside_of_a_stage_are_of_what_is_sure():
    tensors, junk = draw(), draw(1)
    cache, alone = make("linear"), make("linear")
    for each in (cache, alone):
        feed(each, tensors, 0, 20)
    with cache.stage(6):
        feed(cache, junk, 20, 6)
        cache.commit(0)
        copied, loaded = copy.deepcopy(cache), make("linear")
        loaded.load_state_dict(cache.state_dict())
        cache.load_state_dict(alone.state_dict())
        feed(cache, junk, 20, 6)
        cache.commit(0)
        assert same(cache, alone)
        cache.reset()
        feed(cache, tensors, 0, 6)
        cache.commit(2)
    fresh = make("linear")
    for position in range(2):
        feed(fresh, tensors, position, 1)
    assert same(cache, fresh)
    assert same(copied, alone)
    assert same(loaded, alone)
    assert copied.stats().staging_bytes == 0
    assert copied.staged == 0
    feed(copied, tensors, 20, 8)
    feed(alone, tensors, 20, 8)
    assert same(copied, alone)


def test_a_stage_allocates_once_and_says_so():
    """What is kept aside is W slots a head, and is used again by the next stage."""
    tensors = draw()
    cache = make("linear")
    feed(cache, tensors, 0, 20)
    assert cache.stats().staging_bytes == 0
    before = cache.stats()
    with cache.stage(5):
        for _ in range(3):
            feed(cache, tensors, 20, 5)
            cache.commit(0)
        said = cache.stats().staging_bytes
        aside = [staging._aside.keys for staging in cache._stage.stagings]
        assert all(a.shape == (BATCH, HEADS, 5, DIM) for a in aside)
        assert said >= sum(2 * a.nbytes for a in aside)
    with cache.stage(5):
        for _ in range(3):
            feed(cache, tensors, 20, 5)
            cache.commit(0)
        assert cache.stats().staging_bytes == said
        again = [staging._aside.keys for staging in cache._stage.stagings]
        assert all(a is b for a, b in zip(again, aside, strict=True))
    after = cache.stats()
    assert (after.bytes, after.overhead_bytes) == (before.bytes, before.overhead_bytes)


class Late:
    """A raster whose prompt's length is known once the prompt has come, and that may go on."""

    goes_on = True

    def preview(self):
        return None

    def at(self, seen, count, bound):
        if seen < 4:
            return None
        grown = kvpolicy.SequenceLayout(prefix=4, pieces=((4, 5), (24, 3)))
        first = RasterLayout(rows=4, cols=5, prefix=4)
        if bound is None:
            return first
        return grown if seen >= 24 and isinstance(bound, RasterLayout) else bound


@pytest.mark.parametrize("kind", ["late layout", "sliding window", "lent keys", "second process"])
@pytest.mark.parametrize("name", kvpolicy.available())
def test_special_layers(name, kind):
    """Layouts known late, layers with windows, layers whose tokens others use, shared layers."""
    layout, options = RASTER, {}
    if kind == "late layout":
        layout = Late()
    elif kind == "sliding window":
        options = {"windows": [70 if name == "full" else 16, None]}
    elif kind == "lent keys":
        options = {"lent": [0]}
    else:
        options = {"first_head": 2}
    options["reclaim"] = "eager" if len(name + kind) % 2 else "lazy"
    made, floor = policy(name), policy(name).min_budget(RASTER)
    budget = 60 if name == "full" else max(floor, 12)
    staged, alone = (
        PolicyCache(made, budget, layout=layout, num_layers=LAYERS, **options) for _ in range(2)
    )
    tensors, junk = draw(5), draw(6)
    rng = random.Random(name + kind)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    if kind == "sliding window":
        mask = mask & torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(-15)
    mask = mask[None, None]

    def bring(cache, run, first, count):
        rows = mask[:, :, first : first + count, : first + count]
        outputs = feed(cache, run, first, count, visible=rows)
        if kind == "lent keys":
            query = run[0][1, :, :, first : first + count]
            outputs = torch.cat([outputs, cache.attend_shared(0, query)[0][None]])
        return outputs

    for cache in (staged, alone):
        bring(cache, tensors, 0, 4)
        bring(cache, tensors, 4, 1)
    at = 5
    with staged.stage(7):
        while at < TOKENS:
            most = min(7, TOKENS - at)
            if kind == "late layout" and at <= 24 < at + most:
                most = max(24 - at, 1)  # the layout must not change among tokens of a call
            kept = rng.randint(0, most)
            lost = rng.randint(0, most - kept)
            run = mixed(tensors, junk, at + kept)
            if kept + lost:
                outputs = bring(staged, run, at, kept + lost)
            staged.commit(kept)
            for done in range(kept):
                expected = bring(alone, tensors, at + done, 1)
                assert torch.equal(outputs[..., done : done + 1, :], expected)
            at += kept
            assert same(staged, alone)


def mixed(kept, lost, at: int):
    """Other tokens from position ``at`` on."""
    return [torch.cat([a[..., :at, :], b[..., at:, :]], 3) for a, b in zip(kept, lost, strict=True)]


def test_a_layout_that_changes_among_staged_tokens_is_refused():
    tensors = draw()
    cache = PolicyCache("linear", 20, layout=Late(), num_layers=LAYERS)
    with cache.stage(5), pytest.raises(CacheStateError, match="where tokens sit"):
        feed(cache, tensors, 0, 4)
    feed(cache, tensors, 0, 4)
    feed(cache, tensors, 4, 16)
    with cache.stage(9):
        with pytest.raises(kvpolicy.LayoutError, match="a call of its own"):
            feed(cache, tensors, 20, 6)
        feed(cache, tensors, 20, 4)
        feed(cache, tensors, 24, 1)
        assert isinstance(cache.layout, kvpolicy.SequenceLayout)
        cache.commit(4)
        assert isinstance(cache.layout, RasterLayout)
        feed(cache, tensors, 24, 1)
        cache.commit(1)
        assert isinstance(cache.layout, kvpolicy.SequenceLayout)


def test_a_prompt_in_front_of_staged_tokens():
    """One call brings tokens that are sure, and candidates behind them."""
    tensors, junk = draw(), draw(1)
    cache, alone = make("h2o", TEXT), make("h2o", TEXT)
    feed(alone, tensors, 0, 20)
    with cache.stage(6, sure=20):
        feed(cache, mixed(tensors, junk, 22), 0, 26)
        assert (cache.seen, cache.staged) == (26, 6)
        cache.commit(2)
        for position in (20, 21):
            feed(alone, tensors, position, 1)
        assert same(cache, alone)
    with cache.stage(6, sure=24):
        feed(cache, tensors, 22, 1)
        assert cache.staged == 0
        feed(cache, tensors, 23, 2)
        assert cache.staged == 1
    for position in (22, 23):
        feed(alone, tensors, position, 1)
    assert same(cache, alone)
    visible = torch.ones(1, 1, 4, 28, dtype=torch.bool)
    with cache.stage(6, sure=26), pytest.raises(CacheStateError, match="bring them apart"):
        feed(cache, tensors, 24, 4, visible=visible)
    assert same(cache, alone)


def test_more_is_staged_than_was_allocated_at_first():
    """What is kept aside grows to what is needed, within the lookahead."""
    tensors, junk = draw(tokens=300), draw(1, tokens=300)
    layout = TextLayout(sinks=1)
    cache, alone = make("random", layout), make("random", layout)
    for each in (cache, alone):
        feed(each, tensors, 0, 20)
    with cache.stage(1 << 16):
        for first in (20, 70, 120):
            feed(cache, mixed(tensors, junk, 90), first, 50)
        cache.commit(70)
        assert all(s._aside.turns.shape[0] < 400 for s in cache._stage.stagings)
    for position in range(20, 90):
        feed(alone, tensors, position, 1)
    assert same(cache, alone)


def test_a_mask_that_was_written_anew_is_looked_at_anew():
    """Buffers of masks are used again: the same tensor, after as many tokens, may hide others."""
    layout = kvpolicy.TextLayout(sinks=1)
    cache = kvpolicy.PolicyCache("full", 16, layout=layout, num_layers=1)
    cache.attend(0, *torch.randn(3, 1, 1, 5, 8))
    tokens, mask = torch.randn(3, 1, 1, 3, 8), torch.ones(3, 8).tril(5).bool().view(1, 1, 3, 8)
    for hidden in (None, 2):
        if hidden is not None:
            mask[..., hidden] = False
        alone = copy.deepcopy(cache).attend(0, *tokens, visible=mask)
        with cache.stage(lookahead=3):
            staged = cache.attend(0, *tokens, visible=mask)
            torch.testing.assert_close(staged, alone)
            assert cache.staged == 3


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("lookahead", [3, 4, 16])
def test_tokens_stay_before_others_are_taken_back(lookahead, at_once):
    """What slots hold is copied ahead, for tokens behind those that stay, too."""
    tensors, junk = draw(tokens=60), draw(1, tokens=60)
    layout = RasterLayout(rows=6, cols=10, prefix=1)
    cache, alone = make("linear", layout, 25), make("linear", layout, 25)
    for each in (cache, alone):
        feed(each, tensors, 0, 31)
    with cache.stage(lookahead):
        for kept, lost in ((1, 0), (2, 0), (1, 2), (1, 0), (1, 0), (0, 3), (2, 0), (2, 1)):
            at = cache.seen
            size = kept + lost if at_once else 1
            for first in range(at, at + kept + lost, size):
                feed(cache, mixed(tensors, junk, at + kept), first, size)
            cache.commit(kept)
            for position in range(at, at + kept):
                feed(alone, tensors, position, 1)
            assert same(cache, alone), (kept, lost)
