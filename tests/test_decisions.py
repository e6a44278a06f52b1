"""How a ranking is made into victims: fast ways of doing it, against the plain way."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.policy import ScoredPolicy, _lift, _lowest, _sortable

LARGEST = torch.finfo(torch.float32).max
NUMBERS = st.sampled_from([-float("inf"), -LARGEST, -2.0, -0.0, 0.0, 1e-45, 2.0, LARGEST])


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.data())
def test_the_lowest_is_what_sorts_first(numbers, data):
    """Ties are many here, and the older position goes first; an empty slot has position -1."""
    positions = data.draw(st.permutations(range(-1, len(numbers) - 1)))
    score, position = torch.tensor([[numbers]]), torch.tensor([[positions]], dtype=torch.int32)
    assert _lowest(score, position).item() == _sortable(score, position).argmin(-1).item()


@given(st.lists(st.tuples(NUMBERS, st.booleans()), min_size=1, max_size=12))
def test_what_is_protected_is_lifted_and_the_rest_is_left(pairs):
    score = torch.tensor([[[number for number, _ in pairs]]])
    protected = torch.tensor([[[held for _, held in pairs]]])
    lifted = _lift(score, protected)
    assert (lifted[protected] == LARGEST).all()
    # Minus infinity comes back as the lowest finite number, which nothing is below.
    assert torch.equal(lifted[~protected], score[~protected].clamp(min=-LARGEST))


def test_a_prefix_goes_last_whatever_scores_say():
    """Even where all else is protected, and worth infinitely much."""

    class Greedy(ScoredPolicy):
        def protect(self, view):
            return view.index >= 0

        def score(self, view):
            return torch.full(view.positions.shape, float("inf"))

    layout = kvpolicy.RasterLayout(rows=4, cols=4, prefix=2)
    cache = kvpolicy.PolicyCache(Greedy(), 4, layout=layout, num_layers=1)
    for _ in range(layout.length):
        query = key = value = torch.randn(1, 1, 1, 4)
        cache.attend(0, query, key, value)
    assert {0, 1} <= set(cache.positions(0).flatten().tolist())
