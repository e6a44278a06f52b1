"""Budgets are read as they are written, and schedules share them out to the last token."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy import Arithmetic, Budget, BudgetError, PerLayer, RasterLayout, TextLayout, Uniform

FASHION = RasterLayout(rows=28, cols=28, prefix=1)

SCHEDULES = st.one_of(
    st.just(Uniform()),
    st.builds(Arithmetic, beta=st.floats(1, 1e6)),
    st.lists(st.integers(0, 1000), min_size=1, max_size=40)
    .filter(any)
    .map(lambda shares: PerLayer(shares=tuple(shares))),
)


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        (96, 96),
        ("96", 96),
        (" 96 ", 96),
        ("1/6", 130),
        (1 / 6, 130),
        (0.25, 196),
        ("0.25", 196),
        ("25%", 196),
        ("12.5%", 98),
        ("1/1", 784),
        (1.0, 784),
        ("4 lines", 112),
        ("1 line", 28),
        ("4lines", 112),
        (10_000, 784),
        ("100 lines", 784),
    ],
)
def test_spellings(written, tokens):
    assert Budget.parse(written).tokens(FASHION) == tokens


@given(
    st.one_of(
        st.integers(1, 10**9),
        st.integers(1, 10**4).map(lambda count: f"{count} lines"),
        st.fractions(min_value=Fraction(1, 10**6), max_value=1, max_denominator=10**6).map(str),
        st.floats(1e-6, 1.0),
        st.decimals("0.01", 100, places=2).map(lambda percent: f"{percent}%"),
    )
)
def test_str_parses_to_the_same_budget(written):
    budget = Budget.parse(written)
    assert Budget.parse(str(budget)) == Budget.parse(budget) == budget
    assert Budget.model_validate_json(budget.model_dump_json()) == budget


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 9))
def test_a_fraction_is_of_what_is_evictable_and_exact(part, whole, prefix):
    layout = RasterLayout(rows=whole, cols=1, prefix=prefix)
    if part > whole:
        part, whole = whole, part
    expected = part * layout.evictable // whole
    if expected:
        assert Budget.parse(f"{part}/{whole}").tokens(layout) == expected


def test_lines_count_their_line_break():
    layout = RasterLayout(rows=8, cols=7, line_break=1)
    assert Budget.parse("2 lines").tokens(layout) == 16
    assert Budget.parse("3 lines").tokens(TextLayout(line_length=5)) == 15


def test_text_without_a_length_takes_any_number_of_tokens():
    assert Budget.parse(10**6).tokens(TextLayout()) == 10**6


@given(SCHEDULES, st.integers(1, 40), st.integers(0, 400), st.integers(0, 400), st.data())
def test_schedules_share_out_exactly(schedule, layers, floor, above, data):
    budget = floor + above
    ceiling = data.draw(st.one_of(st.none(), st.integers(budget, 2 * budget + 10)))
    if isinstance(schedule, PerLayer):
        # A layer with no share can't take what is left when all others are full.
        shares = tuple(share + 1 for share in (schedule.shares * layers)[:layers])
        schedule = PerLayer(shares=shares)
    budgets = schedule.layers(budget, layers, floor=floor, ceiling=ceiling)
    assert len(budgets) == layers
    assert sum(budgets) == budget * layers
    assert min(budgets) >= floor
    assert ceiling is None or max(budgets) <= ceiling
    assert all(type(tokens) is int for tokens in budgets)
    if isinstance(schedule, Arithmetic):
        assert list(budgets) == sorted(budgets, reverse=True)
    if isinstance(schedule, Uniform):
        assert set(budgets) == {budget}


def test_arithmetic_is_what_pyramidkv_says():
    """The top layer gets 1/beta of the average, and the others rise evenly below it."""
    assert Arithmetic(beta=20).layers(200, 5) == (390, 295, 200, 105, 10)
    assert Arithmetic(beta=1).layers(200, 5) == (200,) * 5
    assert Arithmetic(beta=20).layers(200, 1) == (200,)


def test_what_a_full_layer_cannot_use_goes_to_the_others():
    assert Arithmetic(beta=20).layers(200, 5, ceiling=250) == (250, 250, 250, 228, 22)
    assert PerLayer(shares=(3, 1)).layers(10, 2) == (15, 5)
    assert PerLayer(shares=(3, 1)).layers(10, 2, ceiling=12) == (12, 8)
    assert PerLayer(shares=(1, 0)).layers(10, 2, floor=4) == (16, 4)


def test_shares_that_reach_nobody_are_refused():
    with pytest.raises(BudgetError, match="gives no layer a share of the 3 tokens left"):
        PerLayer(shares=(1, 0)).layers(10, 2, floor=4, ceiling=13)


def test_a_floor_above_the_budget_names_itself():
    with pytest.raises(BudgetError, match="smallest budget that works is 11"):
        Uniform().layers(10, 3, floor=11)
