"""Decoders over a cache: same tokens, same distributions, what is refused, how they are spelled."""

from __future__ import annotations

from contextlib import nullcontext
from io import StringIO

import pytest
import torch
from support.toy_decoding import ToyModel, table

import kvpolicy
from kvpolicy import (
    Decoder,
    JointCache,
    LayoutError,
    ParameterError,
    Sampling,
    Sequential,
    ShapeError,
    SpeculativeJacobi,
    UnknownNameError,
)
from kvpolicy.decoding.sampling import couple

LAYOUT = kvpolicy.RasterLayout(rows=4, cols=5, prefix=1)
MODEL = ToyModel(vocabulary=5, length=LAYOUT.length)
PROMPT = torch.full((3, 1), 5)
POLICIES = {
    "full": ("full", None),
    "linear": (kvpolicy.create("linear", anchors=0, recent_lines=0), 7),
    "linear2d": (kvpolicy.create("linear2d", anchors=0, recent=1), 7),
    "h2o": ("h2o", 6),
    "streaming_llm": ("streaming_llm", 6),
    "random": ("random", 6),
}
WAYS = [(draft, coupled) for draft in ("above", "left", "last", "uniform") for coupled in (0, 1)]


def cache_of(name, layout=LAYOUT):
    policy, budget = POLICIES[name]
    return MODEL.cache(policy, budget, layout)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("window", [2, 4, 21])
def test_greedy_speculation_draws_the_sequential_tokens(name, window):
    greedy = Sampling(temperature=0.0)
    prompt = torch.tensor([[5], [6], [5]])
    cache = cache_of(name)
    plain = Sequential().decode(MODEL.step(cache), cache, prompt, 20, sampling=greedy)
    for draft, coupled in WAYS:
        cache = cache_of(name)
        decoder = SpeculativeJacobi(window=window, draft=draft, coupled=bool(coupled))
        drawn = decoder.decode(MODEL.step(cache), cache, prompt, 20, sampling=greedy)
        assert torch.equal(drawn.tokens, plain.tokens)
        assert drawn.passes <= plain.passes == 20


@pytest.mark.parametrize("name", ["linear", "h2o"])
def test_every_pass_sees_what_sequential_decoding_would_see(name):
    """Logits behind each staged token are those of a cache that had the same tokens one by one."""
    layout = kvpolicy.RasterLayout(rows=2, cols=3, prefix=1)
    model = ToyModel(vocabulary=3, length=layout.length)
    policy = kvpolicy.create(name, anchors=0, recent_lines=0) if name == "linear" else name
    known = table(model, policy, 3, layout)
    cache = model.cache(policy, 3, layout)
    step, compared = model.step(cache), 0

    def watched(tokens):
        nonlocal compared
        first, logits = cache.seen, step(tokens)
        for place in range(tokens.shape[1]):
            seen = torch.cat([past[:, :first], tokens[:, : place + 1]], dim=1)[:, 1:]
            expected = known.logits(seen, seen.shape[1])
            torch.testing.assert_close(logits[:, place], expected, rtol=1e-4, atol=1e-5)
            compared += 1
        past[:, first : first + tokens.shape[1]] = tokens
        return logits

    for seed in range(12):
        cache.reset()
        past = torch.zeros(2, layout.length, dtype=torch.int64)
        chance = torch.Generator().manual_seed(seed)
        prompt = torch.full((2, 1), 3)
        SpeculativeJacobi(window=4).decode(watched, cache, prompt, 6, generator=chance)
    assert compared > 50


def test_what_is_cached_at_the_end_is_what_was_drawn():
    cache = cache_of("h2o")
    drawn = SpeculativeJacobi(window=6).decode(MODEL.step(cache), cache, PROMPT, 12)
    assert cache.seen == 12  # the prompt, and all tokens but the newest
    again = cache_of("h2o")
    for place in range(12):
        MODEL.step(again)(drawn.tokens[:, place : place + 1])
    for layer in range(2):
        assert torch.equal(again.positions(layer), cache.positions(layer))


def test_books_of_a_generation():
    cache, told = cache_of("full"), []
    drawn = SpeculativeJacobi(window=5).decode(
        MODEL.step(cache), cache, PROMPT, 20, advance=told.append
    )
    assert drawn.tokens.shape == (3, 21)
    assert drawn.settled.shape == (3, 20)
    # Each token is settled once, none before the one to its left; the last pass settles the last.
    assert (drawn.settled[:, 1:] >= drawn.settled[:, :-1]).all()
    assert drawn.settled[:, 0].tolist() == [1, 1, 1]
    assert int(drawn.settled.max()) == drawn.passes
    assert sum(told) == 20
    plain = Sequential().decode(MODEL.step(again := cache_of("full")), again, PROMPT, 20)
    assert plain.settled[0].tolist() == list(range(1, 21))


def test_a_seed_makes_it_repeatable():
    def draw(seed):
        cache = cache_of("linear")
        chance = torch.Generator().manual_seed(seed)
        decoder = SpeculativeJacobi(window=6)
        return decoder.decode(MODEL.step(cache), cache, PROMPT, 20, generator=chance).tokens

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("decoder", ["sequential", "sjd:window=6"])
def test_rules_hold_at_every_place(decoder):
    """A grammar: every fifth token is a 4, and 4 comes nowhere else."""

    def rule(ids, scores):
        scores = scores.clone()
        if ids.shape[1] % 5 == 0:
            scores[:, :4] = -torch.inf
        else:
            scores[:, 4] = -torch.inf
        return scores

    cache = cache_of("linear")
    drawn = Decoder.parse(decoder).decode(MODEL.step(cache), cache, PROMPT, 20, rules=[rule])
    ends = torch.arange(21) % 5 == 0
    assert (drawn.tokens[:, 1:][:, ends[1:]] == 4).all()
    assert (drawn.tokens[:, 1:][:, ~ends[1:]] != 4).all()


class NoKeys:
    """A cache that counts tokens, and knows where they sit."""

    def __init__(self, layout):
        self.layout, self.seen, self.staged = layout, 0, 0

    def stage(self, lookahead, together):
        return nullcontext()

    def take(self, count):
        self.seen, self.staged = self.seen + count, count

    def commit(self, count):
        self.seen, self.staged = self.seen - self.staged + count, 0


def test_drafts_above_are_the_tokens_above():
    """Where every line is the same, drafts from above are right and those from the left are not."""
    line = torch.tensor([0, 1, 2, 3, 4])

    def passes(draft):
        cache = NoKeys(LAYOUT)

        def step(tokens):
            image = torch.arange(cache.seen, cache.seen + tokens.shape[1])
            cache.take(tokens.shape[1])
            logits = torch.full((1, tokens.shape[1], 5), -torch.inf)
            logits[:, torch.arange(tokens.shape[1]), line[image % 5]] = 0.0
            return logits

        decoder = SpeculativeJacobi(window=5, draft=draft)
        drawn = decoder.decode(step, cache, PROMPT[:1], 20)
        assert drawn.tokens[0, 1:].tolist() == line.repeat(4).tolist()
        return drawn.passes

    assert passes("above") == 1 + 2 + 3  # the prompt; a line that is new; a pass for each other
    assert passes("left") > 1 + 2 + 3


def test_joined_caches_take_the_same_tokens():
    first, second = cache_of("linear"), cache_of("h2o")
    one, two = MODEL.step(first), MODEL.step(second)

    def guided(tokens):
        logits = one(tokens)
        other = tokens if second.seen else torch.full_like(tokens, 6)
        return logits + 0.5 * (logits - two(other))

    joint = JointCache(first, second)
    assert joint.layout is first.layout
    greedy = Sampling(temperature=0.0)
    drawn = SpeculativeJacobi(window=6).decode(guided, joint, PROMPT, 20, sampling=greedy)
    assert first.seen == second.seen == 20
    first, second = cache_of("linear"), cache_of("h2o")
    one, two = MODEL.step(first), MODEL.step(second)
    plain = Sequential().decode(guided, JointCache(first, second), PROMPT, 20, sampling=greedy)
    assert torch.equal(plain.tokens, drawn.tokens)


# -- sampling ------------------------------------------------------------------------------------


def test_a_coupling_is_a_draw_from_the_new_distribution():
    """And keeps the old draw as often as any coupling can."""
    chance = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 7, generator=chance).softmax(-1)
    count = 200_000
    token = old.multinomial(count, replacement=True, generator=chance)
    drawn, kept = couple(token, old.expand(count, 7), new.expand(count, 7), chance)
    share = torch.bincount(drawn, minlength=7) / count
    torch.testing.assert_close(share, new, rtol=0, atol=0.006)
    assert abs(kept.float().mean() - torch.minimum(old, new).sum()) < 0.006
    same, kept = couple(token, old.expand(count, 7), old.expand(count, 7), chance)
    assert kept.all()
    assert torch.equal(same, token)


def test_sampling_cuts_what_it_says():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 9.0, 0.0, 0.0]])
    plain = Sampling().probabilities(logits)
    assert torch.equal(plain, logits.softmax(-1))
    assert torch.equal(Sampling(top_k=0, top_p=1.0).probabilities(logits), plain)
    cut = Sampling(top_k=2).probabilities(logits)
    assert (cut > 0).sum(-1).tolist() == [2, 5]  # equals of the second likeliest stay
    cut = Sampling(top_p=0.8).probabilities(logits)
    assert (cut > 0).sum(-1).tolist() == [2, 1]
    assert Sampling(temperature=0.0).probabilities(logits).argmax(-1).tolist() == [0, 2]
    hot = Sampling(temperature=2.0).probabilities(logits)
    assert torch.allclose(hot, (logits / 2).softmax(-1))


# -- spelling, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelled", "decoder"),
    [
        ("sequential", Sequential()),
        ("sjd", SpeculativeJacobi()),
        ("sjd:window=16", SpeculativeJacobi(window=16)),
        (
            "sjd:window=16:draft=left:coupled=false",
            SpeculativeJacobi(window=16, draft="left", coupled=False),
        ),
    ],
)
def test_spellings(spelled, decoder):
    assert Decoder.parse(spelled) == decoder
    assert Decoder.parse(decoder) is decoder
    assert Decoder.parse(decoder.label) == decoder
    assert Decoder.parse(spelled).label == spelled


def test_parameters_are_spelled_in_the_order_of_fields():
    assert Decoder.parse("sjd:draft=left:window=8").label == "sjd:window=8:draft=left"


@pytest.mark.parametrize(
    ("spelled", "error", "says"),
    [
        ("sjdd", UnknownNameError, "did you mean 'sjd'"),
        ("", UnknownNameError, "known: 'lpd', 'sequential', 'sjd'"),
        ("sjd:windw=3", ParameterError, "did you mean 'window'"),
        ("sjd:window=1", ParameterError, "greater than or equal to 2"),
        ("sjd:window=8.5", ParameterError, "window"),
        ("sjd:window", ParameterError, "not like window=32"),
        ("sjd:window=", ParameterError, "not like window=32"),
        ("sjd:window=8:window=9", ParameterError, "each parameter once"),
        ("sjd:draft=below", ParameterError, "'above', 'left', 'last' or 'uniform'"),
        ("sequential:window=3", ParameterError, "no parameter 'window'"),
        (7, ParameterError, "neither a Decoder nor a spelling"),
        (None, ParameterError, "neither a Decoder nor a spelling"),
    ],
)
def test_wrong_spellings_are_refused(spelled, error, says):
    with pytest.raises(error, match=says):
        Decoder.parse(spelled)


def never(tokens):
    raise AssertionError("the model ran before the fault was found")


@pytest.mark.parametrize("decoder", ["sequential", "sjd:window=4"])
@pytest.mark.parametrize(
    ("prompt", "count", "error", "says"),
    [
        (torch.zeros(3), 4, ShapeError, r"expected int64 \[B, P\]"),
        (torch.zeros(3, 1), 4, ShapeError, r"float32 \[3, 1\]"),
        (torch.zeros(3, 0, dtype=torch.int64), 4, ShapeError, "at least one token"),
        (PROMPT, 0, ParameterError, "at least 1"),
        (PROMPT, 2.0, ParameterError, "whole number"),
        (PROMPT, 21, LayoutError, "more than the 20"),
    ],
)
def test_wrong_requests_are_refused_before_the_model_runs(decoder, prompt, count, error, says):
    cache = cache_of("full")
    with pytest.raises(error, match=says):
        Decoder.parse(decoder).decode(never, cache, prompt, count, layout=LAYOUT)


def test_a_window_longer_than_the_layout_is_refused():
    with pytest.raises(ParameterError, match="window=22 is longer than the 21 tokens"):
        SpeculativeJacobi(window=22).decode(never, cache_of("full"), PROMPT, 4)
    with pytest.raises(ParameterError, match="the largest that works is 21"):
        SpeculativeJacobi(window=22).check(LAYOUT)


def test_a_cache_that_can_not_stage_is_refused():
    with pytest.raises(ParameterError, match=r"dict has no stage.*decode with 'sequential'"):
        SpeculativeJacobi().decode(never, {}, PROMPT, 4)


def test_a_policy_that_can_not_be_staged_is_refused_by_name():
    class Diarist(type(kvpolicy.create("h2o"))):
        def observers(self, shape):
            found = super().observers(shape)
            for observer in found:
                observer.diary = StringIO()
            return found

    cache = MODEL.cache(Diarist(), 6, LAYOUT)
    with pytest.raises(kvpolicy.CacheStateError, match="diary is a StringIO: tokens can be staged"):
        SpeculativeJacobi(window=4).decode(MODEL.step(cache), cache, PROMPT, 4)
    cache = MODEL.cache(Diarist(), 6, LAYOUT)
    assert Sequential().decode(MODEL.step(cache), cache, PROMPT, 4).passes == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(3, 5), "one row for each token"),
        (torch.zeros(2, 1, 5), r"expected logits \[3, 1, V\]"),
        (None, "returned NoneType"),
    ],
)
@pytest.mark.parametrize("decoder", ["sequential", "sjd:window=4"])
def test_a_step_that_returns_something_else_is_refused(decoder, given, says):
    with pytest.raises(ShapeError, match=says):
        Decoder.parse(decoder).decode(lambda tokens: given, cache_of("full"), PROMPT, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_logits_that_allow_nothing_are_refused(temperature, value):
    sampling = Sampling(temperature=temperature)
    with pytest.raises(kvpolicy.AttentionError, match="NaN, or no token may come"):
        sampling.probabilities(torch.full((2, 3), value))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("topk", 3)],
)
def test_wrong_sampling_is_refused(field, value):
    with pytest.raises(ParameterError, match=field):
        Sampling(**{field: value})
