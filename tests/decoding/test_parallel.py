"""Parallel decoding: groups, position queries, and a cache in which the queries leave nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional

import kvpolicy
from kvpolicy import (
    LayoutError,
    OrderedLayout,
    Parallel,
    ParameterError,
    PolicyCache,
    RasterLayout,
    Sampling,
    ShapeError,
)

GRID = RasterLayout(rows=5, cols=4, prefix=1)
VOCABULARY, WIDTH, HEADS, LAYERS = 7, 8, 2, 2
GREEDY = Sampling(temperature=0)


class PlaceModel:
    """Two layers of attention with random weights; tokens are asked for by row and column."""

    def __init__(self, grid=GRID, seed=0):
        chance = torch.Generator().manual_seed(seed)

        def weight(*size):
            return torch.randn(*size, generator=chance)

        self.tokens = weight(VOCABULARY + 1, WIDTH)
        self.query = weight(WIDTH)
        self.places = weight(grid.length, WIDTH)
        self.layers = [weight(3, WIDTH, WIDTH) for _ in range(LAYERS)]
        self.head = weight(WIDTH, VOCABULARY)

    def embed(self, tokens, places, ask):
        hidden = self.tokens[tokens] + self.places[places[: tokens.shape[1]]]
        queries = (self.query + self.places[places[tokens.shape[1] :]]).expand(len(tokens), -1, -1)
        assert queries.shape[1] == ask
        return torch.cat([hidden, queries], dim=1)

    def run(self, hidden, attend):
        for layer, weights in enumerate(self.layers):
            q, k, v = ((hidden @ w).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in weights)
            given = attend(layer, q, k, v).transpose(1, 2).flatten(2)
            hidden = functional.rms_norm(hidden / 2 + given, (WIDTH,))
        return hidden @ self.head

    def step(self, cache):
        """A step function over a cache; it keeps the keys that came, to compare with."""
        self.came = [[] for _ in self.layers]

        def step(tokens, ask):
            seen, new = cache.seen, tokens.shape[1]
            places = cache.layout.place(torch.arange(seen, seen + new + ask))
            visible = torch.ones(1, 1, new + ask, seen + new + ask, dtype=torch.bool)
            visible[..., :new, seen + new :] = False

            def attend(layer, *given):
                self.came[layer].append([each[:, :, :new] for each in given])
                return cache.attend(layer, *given, visible=visible)

            return self.run(self.embed(tokens, places, ask), attend)[:, new:]

        return step

    def whole(self, tokens, layout, group):
        """Logits of a group, all at once and without a cache, given tokens by arrival."""
        first, end = layout.prefix + group.start, layout.prefix + group.stop
        places = layout.place(torch.cat([torch.arange(first), torch.arange(first, end)]))
        # Groups see earlier groups and themselves; queries see all tokens and each other.
        number = torch.tensor(
            [-1] * layout.prefix + [n for n, size in enumerate(layout.groups) for _ in range(size)]
        )[:end]
        visible = number[None, :] <= number[:, None]

        def attend(layer, q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)

        return self.run(self.embed(tokens[:, :first], places, len(group)), attend)[:, first:]


def prompt(batch=2):
    return torch.full((batch, 1), VOCABULARY)


def spans(layout):
    start = 0
    for size in layout.groups:
        yield range(start, start + size)
        start += size


@pytest.mark.parametrize("passes", [1, 5, 9, 20])
def test_a_full_cache_gives_what_whole_attention_gives(passes):
    decoder = Parallel(passes=passes, repulsion=1, order_seed=3)
    layout = decoder.ordered(GRID)
    model = PlaceModel()
    cache = PolicyCache("full", layout=layout, num_layers=LAYERS)
    told = []
    drawn = decoder.decode(
        model.step(cache), cache, prompt(), 20, sampling=GREEDY, advance=told.append
    )
    assert drawn.passes == passes == len(set(drawn.settled[0].tolist()))
    assert told == list(layout.groups)
    for group in spans(layout):
        expected = model.whole(drawn.tokens, layout, group).argmax(-1)
        first = layout.prefix + group.start
        assert torch.equal(drawn.tokens[:, first : first + len(group)], expected)


def test_raster_order_one_by_one_is_a_special_case():
    layout = OrderedLayout(grid=GRID, order=range(20))
    model = PlaceModel()
    drawn = {}
    for name, where in (("full", layout), ("linear", layout)):
        cache = PolicyCache(name, layout=where, num_layers=LAYERS)
        decoder = Parallel(passes=20)
        drawn[name] = decoder.decode(model.step(cache), cache, prompt(), 20, sampling=GREEDY).tokens
    assert torch.equal(drawn["full"], drawn["linear"])
    assert torch.equal(layout.to_raster(drawn["full"]), drawn["full"])


@pytest.mark.parametrize("policy", ["ahead", "near", "h2o", "streaming_llm", "random", "snapkv"])
@pytest.mark.parametrize("passes", [6, 20])
def test_queries_leave_nothing_behind(policy, passes):
    """The cache is, bit for bit, one that never saw a query, and holds no more than its budget."""
    decoder = Parallel(passes=passes, repulsion=1)
    layout = decoder.ordered(GRID)
    policy = kvpolicy.create(policy, **({"window": 2, "interval": 2} if policy == "snapkv" else {}))
    model = PlaceModel()
    one, other = (PolicyCache(policy, 12, layout=layout, num_layers=LAYERS) for _ in range(2))
    drawn = decoder.decode(model.step(one), one, prompt(), 20, sampling=GREEDY)
    for number in range(passes):
        for layer in range(LAYERS):
            given = model.came[layer][number]
            count = given[0].shape[2]
            visible = torch.ones(1, 1, count, other.layers[layer].seen + count, dtype=torch.bool)
            other.attend(layer, *given, visible=visible)
    assert one.seen == other.seen == 21 - layout.groups[-1]
    for layer in range(LAYERS):
        assert torch.equal(one.positions(layer), other.positions(layer))
    assert max(one.stats().peak_tokens) <= 13
    assert sum(one.stats().evictions) > 0
    raster = layout.to_raster(drawn.tokens)
    for arrival, place in enumerate(layout.order):
        assert torch.equal(raster[:, 1 + place], drawn.tokens[:, 1 + arrival])


def test_a_group_is_drawn_from_what_the_model_says_of_it():
    """Independently, each with its own probabilities: counted over many draws."""
    layout = OrderedLayout(grid=RasterLayout(rows=1, cols=2, prefix=1), order=(1, 0), groups=(2,))
    model = PlaceModel()
    cache = PolicyCache("full", layout=layout, num_layers=LAYERS)
    draws = 20_000
    drawn = (
        Parallel(passes=1)
        .decode(
            model.step(cache), cache, prompt(draws), 2, generator=torch.Generator().manual_seed(0)
        )
        .tokens
    )
    chances = model.whole(prompt(1), layout, range(2)).softmax(-1)[0].double()
    expected = (chances[0, :, None] * chances[1]).flatten()
    seen = torch.bincount(drawn[:, 1] * VOCABULARY + drawn[:, 2], minlength=VOCABULARY**2)
    off = (seen - draws * expected) / (draws * expected * (1 - expected)).sqrt().clamp(min=1)
    assert off.abs().max() < 4.5


def test_the_same_seed_draws_the_same_image():
    decoder = Parallel(passes=6, repulsion=1)
    layout, model = decoder.ordered(GRID), PlaceModel()
    tokens = []
    for seed in (0, 0, 1):
        cache = PolicyCache("near", 12, layout=layout, num_layers=LAYERS)
        chance = torch.Generator().manual_seed(seed)
        tokens.append(
            decoder.decode(model.step(cache), cache, prompt(), 20, generator=chance).tokens
        )
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_spelling():
    decoder = kvpolicy.Decoder.parse("lpd:passes=48")
    assert decoder == Parallel(passes=48)
    assert decoder.label == "lpd:passes=48"
    with pytest.raises(ParameterError, match="passes=0"):
        kvpolicy.Decoder.parse("lpd:passes=0")


def test_what_it_can_not_do_is_refused_by_name():
    decoder = Parallel(passes=6, repulsion=1)
    layout, model = decoder.ordered(GRID), PlaceModel()

    def decode(cache, count=20, first=None, made=decoder, **options):
        step = options.pop("step", None) or model.step(cache)
        return made.decode(step, cache, prompt() if first is None else first, count, **options)

    def cache(where=layout):
        return PolicyCache("full", layout=where, num_layers=LAYERS)

    with pytest.raises(LayoutError, match=re.escape("layout=decoder.ordered(grid)")):
        decode(cache(GRID))
    with pytest.raises(ParameterError, match="draws in 7 passes, and the cache's layout has 6"):
        decode(cache(), made=Parallel(passes=7))
    with pytest.raises(ParameterError, match="rules read them from left to right"):
        decode(cache(), rules=[lambda tokens, logits: logits])
    with pytest.raises(LayoutError, match="count=20, not 1 and 19"):
        decode(cache(), count=19)
    with pytest.raises(LayoutError, match="a prompt of 1 tokens"):
        decode(cache(), first=prompt().repeat(1, 2), count=19)
    with pytest.raises(ParameterError, match="dict has no stage"):
        decode({})
    with pytest.raises(ShapeError, match="when asked for 1 tokens"):
        decode(cache(), step=lambda tokens, ask: torch.zeros(2, 3, VOCABULARY))
    with pytest.raises(ShapeError, match="takes the 21 tokens of a whole sequence"):
        layout.to_raster(torch.zeros(2, 20))
    with pytest.raises(LayoutError, match=r"draft=above.* needs tokens line by line"):
        kvpolicy.Decoder.parse("sjd:window=4:draft=above").check(layout)


class _Newest(kvpolicy.EvictionPolicy):
    """Says nothing of how much it needs."""

    def victims(self, view, count):
        return view.positions.long().masked_fill(view.pinned, 2**30).topk(count, largest=False)[1]


#: What each needs beside the largest group, which has 8 tokens.
PROTECTING = {
    "streaming_llm": 4,
    "near": 0,
    "near/anchors=5": 5,
    "h2o": 6,
    "snapkv/window=3/interval=3": 3,
    "pyramid/window=3/interval=3": 3,
    "newest": 0,
}


@pytest.mark.parametrize("spelling", PROTECTING)
def test_a_budget_that_no_group_fits_in_is_refused_where_it_enters(spelling):
    decoder = Parallel(passes=4, repulsion=1)
    layout = decoder.ordered(GRID)
    assert max(layout.groups) == 8
    policy = _Newest() if spelling == "newest" else kvpolicy.create(spelling)
    floor = policy.min_budget(layout)
    assert floor == 8 + PROTECTING[spelling]
    with pytest.raises(
        kvpolicy.BudgetError,
        match=rf"budget={floor - 1} .* works is {floor}: up to 8 tokens come at once",
    ):
        PolicyCache(policy, floor - 1, layout=layout, num_layers=LAYERS)
    cache = PolicyCache(policy, floor, layout=layout, num_layers=LAYERS)
    decoder.decode(PlaceModel().step(cache), cache, prompt(), 20)
    assert max(cache.stats().peak_tokens) == 1 + min(floor, 20 - 8)


def test_raster_order_in_groups_needs_room_for_a_group_too():
    policy = kvpolicy.create("near", anchors=3)
    layout = OrderedLayout(grid=GRID, order=range(20), groups=(2, 9, 9))
    assert policy.min_budget(layout) == 12
    assert policy.min_budget(OrderedLayout(grid=GRID, order=range(20))) == 4
