"""Orders other than raster: the layout, group sizes, and the locality-aware order."""

from __future__ import annotations

import json
import re
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import (
    LayoutError,
    OrderedLayout,
    ParameterError,
    PolicyCache,
    RasterLayout,
    group_sizes,
    locality_aware_order,
)
from kvpolicy.layout import in_raster_order
from kvpolicy.layout.groups import split_groups

GRIDS = st.builds(
    RasterLayout,
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    line_break=st.integers(0, 1),
    prefix=st.integers(0, 4),
    suffix=st.integers(0, 4),
)
GOLDEN = json.loads(Path(__file__).with_name("golden_orders.json").read_text())
ANY_ORDER = {
    "ahead", "h2o", "knorm", "near", "pyramid", "random", "rkv", "snapkv", "ssd", "streaming_llm",
    "tova",
}  # fmt: skip


def cells(grid):
    return grid.rows * grid.line_length


@st.composite
def ordered(draw):
    grid = draw(GRIDS)
    order = draw(st.permutations(range(cells(grid))))
    cuts = draw(st.sets(st.integers(1, cells(grid) - 1))) if cells(grid) > 1 else set()
    ends = [0, *sorted(cuts), cells(grid)]
    return OrderedLayout(grid=grid, order=order, groups=[b - a for a, b in pairwise(ends)])


# -- the layout ------------------------------------------------------------------------------------


@given(GRIDS)
def test_raster_order_is_the_grid_bit_for_bit(grid):
    layout = OrderedLayout(grid=grid, order=range(cells(grid)))
    assert layout.in_raster_order
    assert in_raster_order(layout)
    assert in_raster_order(grid)
    for name in ("prefix", "length", "line_length", "evictable", "compresses_prompt"):
        assert getattr(layout, name) == getattr(grid, name)
    positions = torch.arange(-1, grid.length + 3, dtype=torch.int32)
    for name in ("line", "column", "is_pinned"):
        mine, theirs = getattr(layout, name)(positions), getattr(grid, name)(positions)
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    for name in ("line", "column", "is_line_start"):
        for position in range(-1, grid.length + 3):
            assert getattr(layout, name)(position) == getattr(grid, name)(position)


@given(ordered())
def test_a_token_is_where_the_order_puts_it(layout):
    check_places(layout)


def test_the_inverse_of_an_order_is_not_the_order(monkeypatch):
    """Whoever takes one for the other is caught by the test above."""
    layout = OrderedLayout(grid=RasterLayout(rows=2, cols=2, prefix=1), order=(1, 2, 0, 3))
    check_places(layout)
    monkeypatch.setattr(OrderedLayout, "place", OrderedLayout.arrival)
    with pytest.raises(AssertionError):
        check_places(layout)


def check_places(layout):
    grid, prefix = layout.grid, layout.prefix
    positions = torch.arange(layout.length)
    places = layout.place(positions)
    assert sorted(places.tolist()) == positions.tolist()
    assert torch.equal(layout.arrival(places), positions)
    for index, place in enumerate(layout.order):
        row, column = divmod(place, grid.line_length)
        position = prefix + index
        assert (layout.line(position), layout.column(position)) == (row, column)
        assert (int(layout.line(positions)[position]), int(layout.column(positions)[position])) == (
            row,
            column,
        )
        assert layout.is_line_start(position) == (column == 0)
        assert layout.arrival(layout.place(position)) == position
    outside = [*range(prefix), *range(prefix + cells(grid), layout.length)]
    assert [layout.place(position) for position in outside] == outside


@given(ordered())
def test_groups_follow_each_other(layout):
    ends = list(accumulate(layout.groups, initial=layout.prefix))
    for start, end in pairwise(ends):
        assert all(layout.group(position) == range(start, end) for position in range(start, end))
    for alone in [*range(layout.prefix), *range(ends[-1], layout.length)]:
        assert layout.group(alone) == range(alone, alone + 1)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"order": range(5)}, LayoutError, "5 is missing"),
        ({"order": [0, 1, 2, 2, 4, 5]}, LayoutError, "2 comes 2 times"),
        ({"order": range(1, 7)}, LayoutError, "0 to 5; 6 is none"),
        ({"order": range(6), "groups": (2, 3)}, LayoutError, "add up to 5 tokens"),
        ({"order": range(6), "groups": (0, 6)}, ParameterError, "groups.0=0"),
        ({"order": "012345"}, ParameterError, "order='012345'"),
        ({"order": [0.0, 1, 2, 3, 4, 5]}, ParameterError, "order.0=0.0"),
        ({"order": [-1, 1, 2, 3, 4, 5]}, ParameterError, "order.0=-1"),
        ({}, ParameterError, "order is missing"),
        ({"order": range(6), "grp": (6,)}, ParameterError, "no parameter 'grp'"),
    ],
)
def test_what_is_no_order_is_refused(given, error, says):
    with pytest.raises(error, match=re.escape(says)):
        OrderedLayout(grid=RasterLayout(rows=2, cols=3), **given)


def test_tensors_arrays_and_json_will_do():
    grid = RasterLayout(rows=2, cols=3, prefix=1)
    order = [5, 0, 1, 4, 3, 2]
    layout = OrderedLayout(grid=grid, order=order, groups=(1, 2, 3))
    assert OrderedLayout(grid=grid, order=torch.tensor(order), groups=torch.tensor([1, 2, 3])) == (
        layout
    )
    assert OrderedLayout(grid=grid, order=np.array(order), groups=[1, 2, 3]) == layout
    assert OrderedLayout.model_validate_json(layout.model_dump_json()) == layout
    assert eval(repr(layout), vars(kvpolicy)) == layout


def test_a_long_order_is_printed_short():
    layout = OrderedLayout.locality_aware(RasterLayout(rows=28, cols=28, prefix=1), 48)
    assert len(repr(layout)) < 350
    assert "776 more" in repr(layout)


# -- policies --------------------------------------------------------------------------------------


def test_raster_policies_are_refused_by_name_before_the_first_token():
    layout = OrderedLayout.locality_aware(RasterLayout(rows=6, cols=6, prefix=1), 9)
    for name in ANY_ORDER:
        PolicyCache(name, 20, layout=layout, num_layers=1)
    others = set(kvpolicy.available()) - {"compose", "full"} - ANY_ORDER
    assert others == {"linear", "linear2d"}
    for name in others:
        with pytest.raises(LayoutError, match=f"'{name}' needs tokens line by line") as refused:
            PolicyCache(name, 20, layout=layout, num_layers=1)
        assert all(other in str(refused.value) for other in ANY_ORDER)


@pytest.mark.parametrize(
    "spelled",
    [
        "h2o/decide=line",
        "h2o/protect=lines:1",
        "h2o/observe=line_mass",
        "h2o/score=moving_mass",
        "h2o/score=least_change",
        "linear/decide=token",
    ],
)
def test_parts_that_need_lines_are_refused_with_what_they_are_in(spelled):
    layout = OrderedLayout.locality_aware(RasterLayout(rows=6, cols=6), 9)
    policy = kvpolicy.create(spelled)
    with pytest.raises(LayoutError, match=re.escape(f"policy {policy.label!r} needs tokens line")):
        PolicyCache(policy, 20, layout=layout, num_layers=1)


def test_raster_policies_take_an_ordered_layout_in_raster_order():
    grid = RasterLayout(rows=6, cols=6, prefix=1)
    tokens = [
        torch.randn(3, 1, 2, 1, 8, generator=torch.Generator().manual_seed(n)) for n in range(37)
    ]
    held = []
    for layout in (grid, OrderedLayout(grid=grid, order=range(36))):
        cache = PolicyCache("linear", 18, layout=layout, num_layers=1)
        for token in tokens:
            cache.attend(0, *token)
        held.append(cache.positions(0))
    assert torch.equal(*held)


def test_a_part_of_somebody_elses_policy_refuses_too():
    """Found out before the first token where it is no score, which is asked at a decision only."""

    class Protects(kvpolicy.ScoredPolicy):
        def protect(self, view):
            return kvpolicy.parts.recent_lines(view, 1)

        def score(self, view):
            return view.positions

    class Moves(kvpolicy.policies.H2O):
        def score(self, view):
            return kvpolicy.parts.moving_mass(view)

    layout = OrderedLayout.locality_aware(RasterLayout(rows=6, cols=6), 9)
    with pytest.raises(LayoutError, match="policy 'Protects' needs tokens line by line"):
        PolicyCache(Protects(), 20, layout=layout, num_layers=1)
    cache = PolicyCache(Moves(), 12, layout=layout, num_layers=1)
    with pytest.raises(LayoutError, match="mass that moves down the lines needs tokens line by"):
        for _ in range(20):
            cache.attend(0, *torch.randn(3, 1, 1, 1, 4))


def test_a_saved_cache_goes_on_in_its_order():
    layout = OrderedLayout.locality_aware(RasterLayout(rows=4, cols=4, prefix=1), 6)
    tokens = [
        torch.randn(3, 1, 1, 1, 4, generator=torch.Generator().manual_seed(n)) for n in range(17)
    ]
    one, other = (PolicyCache("near", 8, layout=layout, num_layers=1) for _ in range(2))
    for token in tokens[:9]:
        one.attend(0, *token)
    other.load_state_dict(one.state_dict())
    for token in tokens[9:]:
        assert torch.equal(one.attend(0, *token), other.attend(0, *token))


def test_near_keeps_what_is_near_on_the_grid():
    """By hand: a 1 x 6 image from its ends inwards, and one slot for each side."""
    layout = OrderedLayout(grid=RasterLayout(rows=1, cols=6), order=(0, 5, 1, 4, 2, 3))
    policy = kvpolicy.create("near", anchors=0, horizon=6)
    cache = PolicyCache(policy, 2, layout=layout, num_layers=1)
    held = []
    for _ in range(6):
        cache.attend(0, *torch.randn(3, 1, 1, 1, 4))
        held.append({layout.order[p] for p in cache.positions(0).flatten().tolist() if p >= 0})
    # Before 1 comes, and then 4, 2 and 3, both ends are worth 1 + 1/4 + 1/9 + 1/16: the older goes.
    # Before 4, 5 is worth 1 + 1/9 + 1/4 and 1 is worth 1/9 + 1 + 1/4: the older goes again.
    # Before 2, 1 is worth 1 + 1/4 and 4 is worth 1/4 + 1; before 3, 4 is worth 1, and so is 2.
    assert held == [{0}, {0, 5}, {5, 1}, {1, 4}, {4, 2}, {2, 3}]


# -- group sizes -----------------------------------------------------------------------------------

PUBLISHED = {
    (256, 20): [1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20],
    (256, 32): [
        1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 10, *[11] * 4, *[12] * 8,
    ],
    (1024, 48): [
        *range(1, 24), 23, 24, 25, 26, 26, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32, 32,
        *[33] * 7, 34,
    ],
}  # fmt: skip


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_the_published_group_sizes_come_out(schedule):
    assert list(group_sizes(*schedule)) == PUBLISHED[schedule]


@given(st.integers(1, 1200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_group_sizes_add_up_and_never_fall(schedule):
    total, passes = schedule
    sizes = group_sizes(total, passes)
    assert len(sizes) == passes
    assert sum(sizes) == total
    assert sizes[0] == (total if passes == 1 else 1)
    assert list(sizes) == sorted(sizes)


def test_an_order_that_would_begin_one_by_one_is_that_of_fewer_passes_split():
    grid = RasterLayout(rows=28, cols=28, prefix=1)
    coarse, fine = (OrderedLayout.locality_aware(grid, passes, repulsion=2) for passes in (56, 128))
    assert coarse.groups == group_sizes(784, 56)
    assert group_sizes(784, 57)[:3] == (1, 1, 1) != coarse.groups[:3]
    assert fine.order == coarse.order
    assert len(fine.groups) == 128
    ends, coarse_ends = (set(accumulate(each.groups)) for each in (fine, coarse))
    assert coarse_ends < ends
    # The first tokens lie far and wide, where those of as many groups of one lie side by side.
    alone = locality_aware_order(28, 28, group_sizes(784, 128), repulsion=2)
    spread, huddled = (np.ptp(np.divmod(order[:12], 28), axis=1) for order in (fine.order, alone))
    assert min(spread) >= 14
    assert max(huddled) < 6


@settings(max_examples=40)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.data())
def test_groups_are_split_evenly(schedule, data):
    total, passes = schedule
    groups = group_sizes(total, passes)
    more = data.draw(st.integers(passes, total))
    split = split_groups(groups, more)
    assert len(split) == more
    ends, whole = list(accumulate(split)), list(accumulate(groups))
    assert set(whole) <= set(ends)
    counts, begin = [], 0
    for end, size in zip(whole, groups, strict=True):
        parts = split[begin : ends.index(end) + 1]
        assert max(parts) - min(parts) <= 1
        counts.append((len(parts), size))
        begin += len(parts)
    # As many parts each, but for one; and those with fewer have no token left to split off.
    most = max(count for count, _ in counts)
    assert all(count >= most - 1 or count == size for count, size in counts)


@pytest.mark.parametrize("passes", [0, -1, 17])
def test_impossible_passes_are_refused(passes):
    with pytest.raises(ParameterError, match=r"from 1 .* to 16"):
        group_sizes(16, passes)


# -- the locality-aware order ----------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g['side']}-{g['passes']}")
def test_orders_are_those_of_the_authors_code(golden):
    """Recorded from orders/lpd_order.py of mit-han-lab/lpd, whose chance was drawn as ours is."""
    side = golden["side"]
    order = locality_aware_order(
        side,
        side,
        group_sizes(side * side, golden["passes"]),
        repulsion=golden["repulsion"],
        proximity=golden.get("proximity", 1.0),
        seed=golden["seed"],
    )
    assert order.tolist() == golden["order"]


@settings(max_examples=25)
@given(
    rows=st.integers(1, 8),
    cols=st.integers(1, 8),
    data=st.data(),
    repulsion=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_locality_aware_orders(rows, cols, data, repulsion, seed):
    """Every place once; and a group keeps apart for as long as there are near places that do."""
    groups = group_sizes(rows * cols, data.draw(st.integers(1, rows * cols)))
    order = locality_aware_order(rows, cols, groups, repulsion=repulsion, seed=seed)
    assert sorted(order.tolist()) == list(range(rows * cols))
    again = locality_aware_order(rows, cols, groups, repulsion=repulsion, seed=seed)
    assert (order == again).all()
    place = [divmod(int(index), cols) for index in order]
    come: set[tuple[int, int]] = set()
    start = 0
    for size in groups:
        group = place[start : start + size]
        near = {p for p in np.ndindex(rows, cols) if p not in come and proximity(p, come) >= 1}
        taken: list[tuple[int, int]] = []
        for each in group:
            if each not in near or any(apart(each, other) <= repulsion for other in taken):
                break
            taken.append(each)
        if come and len(taken) < size:  # no near place was left that keeps apart from these
            left = [p for p in near if p not in taken]
            assert all(any(apart(p, other) <= repulsion for other in taken) for p in left)
        come |= set(group)
        start += size


def apart(one, other):
    return max(abs(one[0] - other[0]), abs(one[1] - other[1]))


def proximity(place, come):
    around = [other for other in come if apart(place, other) == 1]
    return sum(1 / np.hypot(place[0] - other[0], place[1] - other[1]) for other in around)


def test_context_is_nearer_than_in_random_order():
    groups = group_sizes(28 * 28, 48)
    ours = locality_aware_order(28, 28, groups, repulsion=2)
    others = np.random.default_rng(0).permutation(28 * 28)
    assert context(ours, groups) > 1.5 * context(others, groups)


def context(order, groups):
    """Proximity of a token to what has come before its group, on average over the first half."""
    place = [divmod(int(index), 28) for index in order]
    come, found, start = set(), [], 0
    for size in groups:
        found += [proximity(p, come) for p in place[start : start + size]]
        come |= set(place[start : start + size])
        start += size
    return np.mean(found[: len(found) // 2])


@pytest.mark.parametrize("groups", [(), (3, 4), (0, 9), (10,)])
def test_groups_that_do_not_fit_the_grid_are_refused(groups):
    with pytest.raises(ParameterError, match="add up to 3 x 3 = 9"):
        locality_aware_order(3, 3, groups)
