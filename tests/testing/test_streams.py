"""What check_policy drives policies through: all that it says is really there, and counted."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch

import kvpolicy
from kvpolicy import RasterLayout, TextLayout
from kvpolicy.cache.cache import Reclaim
from kvpolicy.testing import Stream, drive
from kvpolicy.testing.check import on_streams
from kvpolicy.testing.streams import Attention

#: Of 300 streams, at least so many have each of these. A floor, about half of what was counted.
EVERY = {
    "an image": 80,
    "a text": 40,
    "a text without a length": 15,
    "an image with line breaks": 40,
    "an image with tokens behind it": 40,
    "an image that ends in mid-line": 15,
    "no prefix": 10,
    "a long prefix": 40,
    "the smallest budget that works": 40,
    "a budget with room for all": 20,
    "several layers": 60,
    "several sequences": 60,
    "several KV heads": 60,
    "several queries a KV head": 60,
    "one by one": 40,
    "in chunks": 60,
    "a prefill, then one by one": 20,
    "float32": 100,
    "bfloat16": 30,
    **{f"attention {kind}": 15 for kind in get_args(Attention)},
    **{f"reclaim {kind}": 60 for kind in get_args(Reclaim)},
    "evicts": 60,
    "evicts in a chunk": 20,
    "a prefill longer than the budget": 10,
    "masses that tie between different tokens": 30,
    "masses of zero beside others": 10,
    "nearly all mass on one token": 8,
}


def features(policy, stream: Stream) -> set[str]:
    """What one stream has, as seen from outside: of the cache, not of the generator's intent."""
    layout, sizes = stream.layout, stream.sizes()
    trace = drive(policy, stream)
    evicts = {(d.step, d.layer) for d in trace.decisions}
    mass = watched(stream)
    needs = policy.min_budget(layout)
    image = isinstance(layout, RasterLayout)
    has = {
        "an image": image,
        "a text": isinstance(layout, TextLayout),
        "a text without a length": layout.length is None,
        "an image with line breaks": image and layout.line_break == 1,
        "an image with tokens behind it": image and layout.suffix > 0,
        "an image that ends in mid-line": image and (stream.tokens - layout.prefix) % layout.cols,
        "no prefix": layout.prefix == 0,
        "a long prefix": layout.prefix > 4,
        "the smallest budget that works": stream.budget == needs,
        "a budget with room for all": stream.budget >= stream.tokens - layout.prefix,
        "several layers": stream.layers > 1,
        "several sequences": stream.batch > 1,
        "several KV heads": stream.heads > 1,
        "several queries a KV head": stream.group > 1,
        "one by one": set(sizes) == {1},
        "in chunks": any(size > 1 for size in sizes),
        "a prefill, then one by one": sizes[0] > 1 and set(sizes[1:]) == {1},
        stream.dtype: trace.outputs[0].dtype == getattr(torch, stream.dtype),
        f"attention {stream.attention}": True,
        f"reclaim {stream.reclaim}": True,
        "evicts": min(trace.stats.evictions) > 0,
        "evicts in a chunk": any(sizes[step] > 1 for step, _ in evicts),
        "a prefill longer than the budget": any(map(trace.compressed, range(stream.layers))),
        "masses that tie between different tokens": ties(mass),
        "masses of zero beside others": bool((mass == 0).any() and (mass > 0).any()),
        "nearly all mass on one token": stream.tokens > 3 and bool((mass.amax(-1) > 0.99).any()),
    }
    return {name for name, there in has.items() if there}


def watched(stream: Stream) -> torch.Tensor:
    """What the newest query of the first layer gives each token, in full, ``[B, H, T]``."""
    tokens = stream.draw()
    query, key, value = (tensor[0] for tensor in (tokens.query, tokens.key, tokens.value))
    _, mass = kvpolicy.attend(query[:, :, -1:], key, value, need_mass=True)
    return mass[:, :, 0]


def ties(mass: torch.Tensor) -> bool:
    ordered = mass.sort(-1).values
    return bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] > 0)).any())


@pytest.fixture(scope="module")
def counts() -> Counter[str]:
    found: Counter[str] = Counter()
    policy = kvpolicy.create("h2o")
    on_streams(policy, lambda stream: found.update(features(policy, stream)), examples=300)
    return found


@pytest.mark.parametrize("feature", EVERY)
def test_streams_have(counts, feature):
    assert counts[feature] >= EVERY[feature], f"{feature}: {counts[feature]} of 300 streams"


@pytest.mark.slow
def test_nothing_is_left_uncounted(counts):
    assert set(counts) == set(EVERY)


def test_a_stream_is_told_in_words():
    layout = RasterLayout(rows=3, cols=4, prefix=2, line_break=1, suffix=1)
    stream = Stream(layout, tokens=18, budget=6, calls=(3, 1), group=2, reclaim="eager")
    assert stream.words() == (
        "an image of 3 lines of 4 tokens and a line break, 1 token behind it, 2 pinned; 18 tokens "
        "come in calls of 3, 1 (15 times); budget 6 a layer; 1 layer, batch 1, 1 KV head of "
        "2 queries, 4 dims; float32, attention 'random'; victims are reclaimed eagerly"
    )
    text = Stream(TextLayout(length=9), tokens=1, budget=6)
    assert text.words().startswith(
        "a text of 9 tokens in lines of 1, 0 pinned; 1 token comes one by one"
    )
