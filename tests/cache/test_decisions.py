"""From scores to victims: what is pinned stays, and nothing is decided from NaN."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy.policy.policy import ScoredPolicy


def test_a_prefix_goes_last_whatever_scores_say():
    """Even where all else is protected, and worth infinitely much."""

    class Greedy(ScoredPolicy):
        def min_budget(self, layout):
            return 4

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
    with pytest.raises(
        kvpolicy.AttentionError, match=r"layer 1: a token's score is NaN before position \d+;"
    ):
        for first in (0, *range(prompt, 12)):
            part = slice(first, prompt if first == 0 else first + 1)
            clean = key[:, :, part].nan_to_num()
            cache.attend(0, clean, clean, clean)
            cache.attend(1, clean, key[:, :, part], key[:, :, part])
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
