"""What ScoredPolicy promises to those who write a policy."""

from __future__ import annotations

import torch

import kvpolicy


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
