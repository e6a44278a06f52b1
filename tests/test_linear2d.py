"""linear2d's score, against a plain reading of its formula; the rest is the suite's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import ParameterError, PolicyCache, RasterLayout
from kvpolicy.policies import Linear, Linear2D


def plain(positions, mass, layout, shift):
    """One slot at a time, by the formula."""
    score = mass.clone()
    for index in torch.cartesian_prod(*map(torch.arange, positions.shape)).tolist():
        batch, head, _ = index
        above = int(positions[tuple(index)]) - layout.line_length
        if above >= layout.prefix:
            for slot, position in enumerate(positions[batch, head].tolist()):
                if position == above:
                    score[tuple(index)] += shift * mass[batch, head, slot]
    return score


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    prefix=st.integers(0, 3),
    cols=st.integers(2, 4),
    line_break=st.integers(0, 1),
    shift=st.sampled_from([0.0, 0.5, 2.0]),
    reclaim=st.sampled_from(["lazy", "eager"]),
)
def test_the_score_is_its_formula(seed, prefix, cols, line_break, shift, reclaim):
    layout = RasterLayout(rows=6, cols=cols, prefix=prefix, line_break=line_break)
    scored = []

    class Watched(Linear2D):
        def score(self, view):
            own = super().score(view)
            real = view.positions >= layout.prefix  # the prefix is pinned, whatever it scores
            want = plain(view.positions, view.mass, layout, shift)
            torch.testing.assert_close(own[real], want[real])
            scored.append(view.seen)
            return own

    policy = Watched(anchors=1, recent_lines=0, shift=shift)
    budget = policy.min_budget(layout) + 2
    cache = PolicyCache(policy, budget, layout=layout, num_layers=1, reclaim=reclaim)
    draw = torch.Generator().manual_seed(seed)
    shape = (2, 2, layout.length, 4)
    cache.attend(0, *(torch.randn(shape, generator=draw) for _ in range(3)))
    assert scored, "nothing was decided"


def test_without_a_shift_it_is_linear():
    layout = RasterLayout(rows=7, cols=4, prefix=1)
    held = []
    for policy in (Linear(anchors=2), Linear2D(anchors=2, shift=0), Linear2D(anchors=2, shift=3)):
        cache = PolicyCache(policy, 13, layout=layout, num_layers=1)
        draw = torch.Generator().manual_seed(1)
        shape = (3, 2, layout.length, 4)
        cache.attend(0, *(3 * torch.randn(shape, generator=draw) for _ in range(3)))
        held.append(cache.positions(0).sort(-1).values)
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])


def test_a_negative_shift_is_refused():
    with pytest.raises(ParameterError, match="shift=-1"):
        kvpolicy.create("linear2d", shift=-1)
