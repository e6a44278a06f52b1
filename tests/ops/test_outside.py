"""A mask that is known by two numbers: a tensor to whoever looks, and to a kernel the numbers."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.errors import ShapeError
from kvpolicy.ops import rank, triton
from kvpolicy.ops.outside import NO_FIRST, NO_LAST, Outside, outside

HELD = torch.tensor([[[0, 7, -1, 3, 11, 5]]], dtype=torch.int32)
WHOLE = [(2, 9), (NO_FIRST, 5), (4, NO_LAST), (NO_FIRST, NO_LAST), (8, 3), (-5, -1)]


def plain(first: int, last: int, positions: torch.Tensor = HELD) -> torch.Tensor:
    return (positions < first) | (positions >= last)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the positions lay where the kernel runs."""
    monkeypatch.setattr(triton, "_on_gpu", lambda tensor: True)


@pytest.mark.parametrize(("first", "last"), WHOLE)
def test_it_is_the_mask_that_comparisons_give(first, last):
    lazy = Outside(HELD, first, last)
    assert isinstance(lazy, torch.Tensor)
    assert (lazy.dtype, lazy.shape, lazy.device) == (torch.bool, HELD.shape, HELD.device)
    expected = plain(first, last)
    assert torch.equal(lazy, expected)
    assert torch.equal(outside(HELD, first=first, last=last), expected)
    score = torch.arange(6.0).view(1, 1, 6)
    for given, known in ((lazy, expected), (lazy[..., 1:], expected[..., 1:])):
        shown = score[..., -given.shape[2] :]
        assert torch.equal(~given, ~known)
        assert torch.equal(given & (shown > 2), known & (shown > 2))
        assert torch.equal((shown > 2) | given, (shown > 2) | known)
        assert torch.equal(torch.where(given, shown, -1.0), torch.where(known, shown, -1.0))
        assert torch.equal(shown.masked_fill(given, 9.0), shown.masked_fill(known, 9.0))
        assert given.sum().item() == known.sum().item()
        assert torch.equal(shown.add(given, alpha=3), shown.add(known, alpha=3))
    # From C++, past Python's hooks.
    assert torch.equal(torch.ops.aten.bitwise_not(lazy), ~expected)


@pytest.mark.parametrize("unite", [torch.bitwise_or, torch.logical_or, lambda a, b: a | b])
def test_a_union_of_the_same_positions_stays_two_numbers(unite):
    for first in WHOLE:
        for second in WHOLE:
            both = unite(Outside(HELD, *first), Outside(HELD, *second))
            assert type(both) is Outside
            assert torch.equal(both, plain(*first) | plain(*second))


def test_a_union_with_anything_else_is_worked_out():
    lazy = Outside(HELD, 2, 9)
    other = Outside(HELD.flip(2), 2, 9)
    assert type(lazy | other) is torch.Tensor
    assert torch.equal(lazy | other, plain(2, 9) | plain(2, 9).flip(2))
    assert type(lazy | plain(0, 4)) is torch.Tensor


def test_it_is_made_where_the_kernel_ranks_and_nowhere_else(on_gpu):
    assert type(outside(HELD, first=2)) is Outside
    many = torch.zeros(1, 1, 5000, dtype=torch.int32)
    assert type(outside(many, first=2)) is torch.Tensor  # which sorting is faster for


def test_the_kernel_is_given_the_numbers(on_gpu, monkeypatch):
    given = []

    def kernel(score, positions, count, protected, pinned, prefix):
        given.append(protected)
        return torch.zeros(1, 1, count, dtype=torch.int64)

    monkeypatch.setattr(triton, "_lowest", kernel)
    monkeypatch.setattr(rank.native, "serving", lambda *_: None)
    score = torch.zeros(1, 1, 6)
    rank.lowest(score, HELD, 2, protected=outside(HELD, first=2) | Outside(HELD, 0, 9))
    assert given == [(2, 9)]
    # Of other positions the kernel knows nothing.
    other = HELD.flip(2)
    rank.lowest(score, HELD, 2, protected=outside(other, first=2))
    assert torch.equal(given[1], other < 2)


def test_a_mask_that_is_not_bool_is_refused():
    with pytest.raises(ShapeError, match="must be bool"):
        rank.lowest(torch.zeros(1, 1, 6), HELD, 2, protected=HELD)


@pytest.mark.parametrize(("first", "last"), WHOLE)
def test_ranking_without_the_kernel_works_it_out(first, last):
    score = torch.tensor([[[5.0, 1.0, 4.0, 2.0, 0.0, 3.0]]])
    lazy, _ = rank.lowest(score, HELD, 4, protected=Outside(HELD, first, last))
    expected, _ = rank.lowest(score, HELD, 4, protected=plain(first, last))
    assert torch.equal(lazy, expected)
