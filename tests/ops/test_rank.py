"""Ranking in plain torch: which slots go first, and how ties are broken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.ops.rank import leveled, lowest

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max
NUMBERS = st.sampled_from([-INF, -LARGEST, -2.0, -0.0, 0.0, 1e-45, 2.0, LARGEST])
#: Score, whether the token is protected, and whether the slot is empty.
SLOTS = st.lists(st.tuples(NUMBERS, st.booleans(), st.booleans()), min_size=1, max_size=12)


def row(numbers, dtype=None):
    return torch.tensor([[numbers]], dtype=dtype)


@given(SLOTS, st.integers(0, 3), st.booleans(), st.data())
def test_the_order_is_that_of_python(slots, prefix, by_mask, data):
    """Empty, then by score and position, then protected, then the prefix; ties are many here."""
    if not by_mask:  # else the prefix would lie in the first slots, none of which is empty
        slots = [(score, held, False) for score, held, _ in slots]
    count = len(slots)
    first = min(prefix, count)
    rest = data.draw(st.permutations(range(first, count)))
    positions = [*range(first), *rest]
    if by_mask:
        positions = data.draw(st.permutations(positions))
    positions = [-1 if slots[at][2] else place for at, place in enumerate(positions)]

    def order(at):
        score, held, empty = slots[at]
        level = min(max(score, -LARGEST / 4), LARGEST / 4)
        level = float(torch.tensor(level) + (2.5 * LARGEST / 4 if held else 0.0))
        pinned = 0 <= positions[at] < prefix
        return (0,) if empty else (3,) if pinned else (2 if held else 1, level, positions[at])

    terms = {"pinned": (row(positions) < prefix) & (row(positions) >= 0)}
    if not by_mask:
        terms = {"prefix": prefix, "may_be_empty": False}
    asked = data.draw(st.integers(1, count))
    found, numbers = lowest(
        row([score for score, _, _ in slots]),
        row(positions, torch.int32),
        asked,
        protected=row([held for _, held, _ in slots]),
        **terms,
    )
    assert numbers
    chosen = found.flatten().tolist()
    assert len(set(chosen)) == asked
    assert [order(at) for at in chosen] == sorted(map(order, range(count)))[:asked]


@given(st.lists(st.tuples(NUMBERS, st.booleans()), min_size=1, max_size=12))
def test_what_is_protected_is_lifted_and_the_rest_is_left(pairs):
    score = row([number for number, _ in pairs])
    protected = row([held for _, held in pairs])
    positions = torch.arange(len(pairs), dtype=torch.int32).view_as(score)
    level = leveled(score, positions, protected=protected)
    free = level[~protected]
    assert not protected.any() or not free.numel() or level[protected].min() > free.max()
    # Beyond a quarter of the largest number, which is room for what is protected, all is the same.
    assert torch.equal(free, score[~protected].clamp(-LARGEST / 4, LARGEST / 4))
    assert level.isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("nan", [NAN, -NAN])
def test_nan_is_told_and_never_worth_more_than_the_prefix(nan, count):
    """Where nobody waits for the check, what comes of NaN must still leave the prefix alone."""
    positions = torch.arange(5, dtype=torch.int32).view(1, 1, 5)
    slots, numbers = lowest(row([0.0, 0.0, 3.0, 1.0, nan]), positions, count, prefix=2)
    assert not numbers
    assert slots.flatten().tolist() == [4, 3, 2][:count]


def test_infinities_of_both_signs_are_numbers():
    """Though their sum is not."""
    positions = torch.arange(2, dtype=torch.int32).view(1, 1, 2)
    slots, numbers = lowest(row([INF, -INF]), positions, 2)
    assert numbers
    assert slots.flatten().tolist() == [1, 0]


def test_other_dtypes_are_scores_too():
    positions = torch.arange(3, dtype=torch.int32).view(1, 1, 3)
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
        slots, _ = lowest(row([1, 0, 1], dtype), positions, 2)
        assert slots.flatten().tolist() == [1, 0]
