"""The smallest budget that works, worked out from what a policy protects and wants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import ParameterError, RasterLayout, SequenceLayout, TextLayout, create
from kvpolicy.policy.probe import shortest_interval

LAYOUTS = st.one_of(
    st.builds(
        RasterLayout,
        rows=st.integers(1, 12),
        cols=st.integers(1, 9),
        prefix=st.integers(0, 9),
        line_break=st.integers(0, 1),
        suffix=st.integers(0, 3),
    ),
    st.builds(TextLayout, sinks=st.integers(0, 5), line_length=st.integers(1, 7)),
    st.just(SequenceLayout(prefix=3, pieces=((3, 5), (20, 5), (26, 4)))),
)
COUNTS = st.integers(0, 20)


@settings(deadline=None, max_examples=60)
@given(layout=LAYOUTS, anchors=COUNTS, lines=st.integers(0, 3), tokens=st.integers(1, 9))
def test_of_lines_and_anchors(layout, anchors, lines, tokens):
    line = layout.line_length
    policy = create("linear", anchors=anchors, recent_lines=lines)
    assert policy.min_budget(layout) == anchors + (lines + 1) * line
    # At a line's last token, the others of the line are protected; then so much room is wanted.
    every = create(f"linear/anchors={anchors}/recent_lines={lines}/decide=every:{tokens}")
    assert every.min_budget(layout) == anchors + (lines + 1) * line - 1 + tokens


@settings(deadline=None, max_examples=60)
@given(layout=LAYOUTS, anchors=COUNTS, recent=st.integers(1, 9), parts=st.integers(1, 9))
def test_of_newest_tokens_and_parts_of_a_line(layout, anchors, recent, parts):
    policy = create("linear2d", anchors=anchors, recent=recent, parts=parts)
    assert policy.min_budget(layout) == anchors + recent + math.ceil(layout.line_length / parts)


@settings(deadline=None, max_examples=60)
@given(layout=LAYOUTS, share=st.floats(0, 0.99), anchors=COUNTS, room=st.integers(1, 9))
def test_of_a_share(layout, share, anchors, room):
    policy = create(f"h2o/protect=anchors:{anchors}+share:{share!r}/decide=every:{room}")
    found = policy.min_budget(layout)

    def enough(budget):
        return anchors + max(math.ceil(share * budget) - 1, 0) + room <= budget

    assert enough(found)
    assert not any(map(enough, range(1, found)))


@settings(deadline=None, max_examples=30)
@given(layout=LAYOUTS, window=st.integers(1, 9), more=st.integers(0, 9))
def test_of_a_window(layout, window, more):
    interval = window + more
    for name in ("snapkv", "pyramid", "rkv"):
        policy = create(name, window=window, interval=interval)
        assert policy.min_budget(layout) == window + interval
        assert shortest_interval(policy, layout) == interval


def test_nothing_protected_needs_one():
    for name in ("random", "knorm", "tova", "compose"):
        assert create(name).min_budget(RasterLayout(rows=9, cols=9)) == 1


class ByMass(kvpolicy.ScoredPolicy):
    """Protects by what it reads."""

    def observers(self, shape):
        return (kvpolicy.CumulativeMass(shape),)

    def protect(self, view):
        return view.mass > 0.5

    def score(self, view):
        return view.mass


class ByKeys(ByMass):
    """Another way to."""

    def protect(self, view):
        return view.keys.norm(dim=-1) > 2


class ByObserver(ByMass):
    """And another."""

    def protect(self, view):
        return view.observed(kvpolicy.CumulativeMass) > 0.5


@pytest.mark.parametrize(
    ("kind", "what"), [(ByMass, "mass"), (ByKeys, "keys"), (ByObserver, "CumulativeMass")]
)
def test_what_protects_by_what_it_reads_is_told_to_say_how_much(kind, what):
    with pytest.raises(ParameterError, match=rf"reads {what}, which .* override min_budget"):
        kvpolicy.PolicyCache(kind(), 4, layout=TextLayout(), num_layers=1)

    class Says(kind):
        def min_budget(self, layout):
            return 3

    kvpolicy.PolicyCache(Says(), 4, layout=TextLayout(), num_layers=1)


def test_a_window_is_checked_on_the_layout_where_that_decides():
    policy = create("snapkv/decide=line")  # a window of 8 queries
    assert policy.min_budget(RasterLayout(rows=9, cols=8)) == 16
    with pytest.raises(ParameterError, match="window=8 must be at most interval=7"):
        policy.min_budget(RasterLayout(rows=9, cols=7))


def test_mass_is_that_of_attention_whatever_else_is_watched():
    class Both(kvpolicy.ScoredPolicy):
        def observers(self, shape):
            return (kvpolicy.parts.KeyLengths(shape), kvpolicy.CumulativeMass(shape))

        def score(self, view):
            return view.mass

    from kvpolicy.testing import Stream, drive

    layout = RasterLayout(rows=5, cols=4)
    stream = Stream(layout=layout, tokens=20, budget=6)
    mine, h2o = drive(Both(), stream), drive(create("h2o", recent=0.0), stream)
    assert len(mine.decisions) == len(h2o.decisions) > 5
    for a, b in zip(mine.decisions, h2o.decisions, strict=True):
        assert a.slots.equal(b.slots)
