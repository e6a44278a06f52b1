"""Every registered policy keeps every invariant, in both ways to reclaim."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import Phase, find, settings

import kvpolicy
from kvpolicy.cache.cache import Reclaim
from kvpolicy.testing import (
    INVARIANTS,
    applicable,
    check_policy,
    drive,
    find_violation,
    streams,
)
from kvpolicy.testing.check import on_streams

#: Parameters so small that short streams already evict; a policy that is not listed takes its own.
SMALL = {
    "linear": {"anchors": 3, "recent_lines": 1},
    "linear2d": {"anchors": 3, "recent": "1 line"},
    "streaming_llm": {"sinks": 2},
    "pyramid": {"window": 2, "interval": 3, "kernel": 3},
    "snapkv": {"window": 2, "interval": 3, "kernel": 3},
    "rkv": {"window": 2, "interval": 3, "kernel": 3},
    "ssd": {"window": 3},
}
POLICIES = kvpolicy.available()
DESIGN = {
    "budget": 1,
    "pins": 2,
    "line locality": 3,
    "once gone, gone": 4,
    "truth": 5,
    "lossless": 6,
    "independence": 7,
    "determinism": 8,
    "inter-line only": 9,
    "full use": 10,
}


def small(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **SMALL.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_keeps_every_invariant(name):
    # These streams of theirs catch 76 of the 79 mutants, the rest take more of one policy; but a
    # fault of the cache meets those of all policies.
    check_policy(small(name), examples=40, seed=1)


@pytest.mark.parametrize("reclaim", get_args(Reclaim))
def test_streams_of_one_way_to_reclaim(reclaim):
    policy, seen = small("linear"), set()

    def attempt(stream) -> None:
        seen.add(stream.reclaim)

    on_streams(policy, attempt, examples=5, reclaim=reclaim)
    assert seen == {reclaim}
    found = find_violation(policy, applicable(policy), examples=3, reclaim=reclaim)
    assert found is None, str(found)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", {"anchors": 0, "recent_lines": 0}),
        ("linear", {"anchors": 7, "recent_lines": 2}),
        ("linear", {}),
        ("streaming_llm", {"sinks": 0}),
        ("h2o", {"recent": 0.0}),
        ("h2o", {"recent": 1.0}),
        ("pyramid", {"beta": 1.0, "window": 1, "interval": 1, "kernel": 1}),
        ("pyramid", {}),
        ("random", {"seed": 7}),
    ],
)
def test_keeps_every_invariant_at_the_ends_of_its_parameters(name, parameters):
    check_policy(kvpolicy.create(name, **parameters), examples=8)


def test_there_is_a_check_for_invariants_one_to_ten():
    assert set(DESIGN) <= set(INVARIANTS)
    assert sorted(DESIGN.values()) == list(range(1, 11))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(lambda s, t: s.layout.prefix == 8, id="a long prefix"),
        pytest.param(lambda s, t: s.layout.prefix == 0, id="no prefix"),
        pytest.param(lambda s, t: s.batch > 1 and s.heads > 1 and s.group > 1, id="grouped"),
        pytest.param(lambda s, t: s.layout.length != s.tokens, id="a ragged end"),
        pytest.param(lambda s, t: t.compressed(0), id="a prompt longer than the budget"),
        pytest.param(lambda s, t: len(s.sizes()) < s.tokens, id="chunks"),
        pytest.param(lambda s, t: s.layers > 1, id="several layers"),
        pytest.param(lambda s, t: s.dtype == "bfloat16", id="bfloat16"),
        pytest.param(lambda s, t: s.attention == "tied", id="ties"),
    ],
)
def test_streams_reach_evictions_with(name, wanted):
    """The suite would be worth little if nothing was ever evicted where it matters."""
    policy = small(name)

    def reached(stream) -> bool:
        trace = drive(policy, stream)
        return bool(trace.decisions) and wanted(stream, trace)

    once = settings(max_examples=300, database=None, deadline=None, phases=(Phase.generate,))
    find(streams(policy), reached, settings=once)
