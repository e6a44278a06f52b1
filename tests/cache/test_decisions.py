"""How a ranking is made into victims: fast ways of doing it, against the plain way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.ops.rank import lift, lowest, sortable, without_nan
from kvpolicy.policy.policy import ScoredPolicy

LARGEST = torch.finfo(torch.float32).max
NUMBERS = st.sampled_from([-float("inf"), -LARGEST, -2.0, -0.0, 0.0, 1e-45, 2.0, LARGEST])


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.data())
def test_the_lowest_is_what_sorts_first(numbers, data):
    """Ties are many here, and the older position goes first; an empty slot has position -1."""
    positions = data.draw(st.permutations(range(-1, len(numbers) - 1)))
    score, position = torch.tensor([[numbers]]), torch.tensor([[positions]], dtype=torch.int32)
    least = score.amin(-1, keepdim=True)
    assert lowest(score, position, least).item() == sortable(score, position).argmin(-1).item()


@given(st.lists(st.tuples(NUMBERS, st.booleans()), min_size=1, max_size=12))
def test_what_is_protected_is_lifted_and_the_rest_is_left(pairs):
    score = torch.tensor([[[number for number, _ in pairs]]])
    protected = torch.tensor([[[held for _, held in pairs]]])
    lifted = lift(score, protected)
    free = lifted[~protected]
    assert not protected.any() or not free.numel() or lifted[protected].min() > free.max()
    # Beyond a quarter of the largest number, which is room for what is protected, all is the same.
    assert torch.equal(free, score[~protected].clamp(-LARGEST / 4, LARGEST / 4))
    assert lifted.isfinite().all()


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


NAN = float("nan")


@pytest.mark.parametrize("nan", [NAN, -NAN])
def test_nan_is_never_worth_more_than_the_prefix(nan):
    """Where nobody waits for the check, what comes of NaN must still leave the prefix alone."""
    score = torch.tensor([[[float("inf"), float("inf"), 3.0, 1.0, nan]]])
    position = torch.tensor([[[0, 1, 2, 3, 4]]], dtype=torch.int32)
    least = without_nan(score.amin(-1, keepdim=True))
    assert lowest(score, position, least).item() == 4
    assert sortable(score, position).argsort(-1)[..., :3].tolist() == [[[4, 3, 2]]]


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize("prompt", [1, 7], ids=["token by token", "a prompt"])
@pytest.mark.parametrize("policy", ["knorm", "knorm/decide=every:3", "knorm/protect=window:1"])
def test_nan_is_refused_before_a_decision_is_made_from_it(policy, prompt, reclaim):
    """Also by a policy that observes nothing, so that no attention is looked at."""
    cache = kvpolicy.PolicyCache(
        policy, 4, layout=kvpolicy.TextLayout(sinks=1), num_layers=2, reclaim=reclaim
    )
    key = torch.randn(2, 2, 12, 4)
    key[1, 0, 4, 2] = NAN
    name = kvpolicy.create(policy).label
    with pytest.raises(kvpolicy.AttentionError, match=rf"layer 1: {name} scores .* position \d+;"):
        for first in (0, *range(prompt, 12)):
            part = slice(first, prompt if first == 0 else first + 1)
            cache.attend(1, key[:, :, part].nan_to_num(), key[:, :, part], key[:, :, part])
    store = cache.layers[1].store
    if store is not None:  # a prompt that is refused leaves nothing
        assert (store.positions == 0).any(-1).all(), "the sink went"


def test_nan_where_a_prefix_or_nothing_lies_harms_nobody():
    """Their scores count for nothing: the one stays, and the other goes before any token."""
    layout = kvpolicy.TextLayout(sinks=1)
    cache = kvpolicy.PolicyCache("knorm", 4, layout=layout, num_layers=1, reclaim="eager")
    for position in range(12):
        key = torch.full((1, 1, 1, 4), NAN if position == 0 else float(position))
        cache.attend(0, key, key, key)
    assert (cache.positions(0) == 0).any()
