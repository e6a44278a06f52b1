"""What ScoredPolicy promises to those who write a policy."""

from __future__ import annotations

import torch

import kvpolicy
from kvpolicy.ops import rank


class KeepsAll(kvpolicy.ScoredPolicy):
    """Protects more than fits."""

    def min_budget(self, layout):
        return 1

    def protect(self, view):
        return view.positions >= 0

    def score(self, view):
        return -view.age


def test_the_prefix_stays_even_if_a_policy_protects_everything():
    layout = kvpolicy.RasterLayout(rows=4, cols=4, prefix=3)
    cache = kvpolicy.PolicyCache(KeepsAll(), 5, layout=layout, num_layers=1)
    for _ in range(layout.length):
        cache.attend(0, *torch.randn(3, 1, 2, 1, 4))
    held = cache.positions(0)
    for position in range(layout.prefix):
        assert (held == position).any(-1).all()


def test_positions_rank_as_they_are_and_decide_as_any_other_score(monkeypatch):
    """No ties to break and no NaN to look for; whole numbers of another kind are scores."""
    given = []
    whole = rank.lowest

    def lowest(score, *more, **named):
        given.append(score.dtype)
        return whole(score, *more, **named)

    monkeypatch.setattr(rank, "lowest", lowest)

    class Age(kvpolicy.policies.StreamingLLM):
        def score(self, view):
            return -view.age

    layout = kvpolicy.RasterLayout(rows=9, cols=4, prefix=1)
    for reclaim in ("lazy", "eager"):
        held = []
        for kind, dtype in ((kvpolicy.policies.StreamingLLM, torch.int32), (Age, torch.float32)):
            cache = kvpolicy.PolicyCache(
                kind(sinks=2), 7, layout=layout, num_layers=1, reclaim=reclaim
            )
            for _ in range(layout.length):
                cache.attend(0, *torch.randn(3, 2, 2, 1, 4))
            assert set(given) == {dtype}
            given.clear()
            held.append(cache.positions(0).sort(-1).values)
        assert torch.equal(*held)
