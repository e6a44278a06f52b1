"""linear2d's choice, against a plain reading of its formula; the rest is the suite's."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import ParameterError, PolicyCache, RasterLayout
from kvpolicy.parts import moving_mass
from kvpolicy.policies import Linear, Linear2D
from kvpolicy.policies.linear2d import change_alone

SHAPES = {
    "seed": st.integers(0, 10**6),
    "prefix": st.integers(0, 3),
    "cols": st.integers(2, 4),
    "line_break": st.integers(0, 1),
    "reclaim": st.sampled_from(["lazy", "eager"]),
}


def moved(positions, mass, layout, lines):
    """Mass moved down, one slot of one head at a time: ``[S]``."""
    found = torch.zeros(len(positions), dtype=torch.float64)
    where = {int(position): slot for slot, position in enumerate(positions)}
    for slot, position in enumerate(positions.tolist()):
        above = position - lines * layout.line_length
        if position >= 0 and (lines == 0 or above >= layout.prefix) and above in where:
            found[slot] = mass[where[above]]
    return found


def changes(view, batch, head, lines):
    """What each slot adds to each line's output if it goes, ``[1 + lines, S, D]``."""
    positions, mass = view.positions[batch, head], view.mass[batch, head].double()
    values = view.values[batch, head].double()
    found = []
    for line in range(lines + 1):
        weight = moved(positions, mass, view.layout, line)
        read = (weight[:, None] * values).sum(0) / max(float(weight.sum()), 1e-30)
        found.append(weight[:, None] * (read - values))
    return torch.stack(found)


def drive(policy, layout, seed, reclaim="lazy", more=2):
    cache = PolicyCache(
        policy, policy.min_budget(layout) + more, layout=layout, num_layers=1, reclaim=reclaim
    )
    draw = torch.Generator().manual_seed(seed)
    shape = (2, 2, layout.length, 4)
    cache.attend(0, *(torch.randn(shape, generator=draw) for _ in range(3)))
    return cache


@settings(deadline=None, max_examples=30)
@given(**SHAPES, lines=st.integers(0, 3), parts=st.integers(1, 4))
def test_each_victim_adds_least_to_the_change(
    seed, prefix, cols, line_break, reclaim, lines, parts
):
    layout = RasterLayout(rows=6, cols=cols, prefix=prefix, line_break=line_break)
    decisions = []

    class Watched(Linear2D):
        def victims(self, view, count):
            chosen = super().victims(view, count)
            free = (view.positions >= layout.prefix) & ~self.protect(view)
            for batch, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
                change = changes(view, batch, head, lines)
                gone = change.new_zeros(change.shape[0], change.shape[2])
                left = set(free[batch, head].nonzero().flatten().tolist())
                for slot in chosen[batch, head].tolist():
                    if view.positions[batch, head, slot] < 0:  # an empty slot costs nothing
                        continue
                    costs = {
                        other: float((gone + change[:, other]).square().sum()) for other in left
                    }
                    assert costs[slot] <= min(costs.values()) * (1 + 1e-4) + 1e-7
                    gone += change[:, slot]
                    left.remove(slot)
            decisions.append(count)
            return chosen

    policy = Watched(anchors=1, recent=1, lines=lines, parts=parts)
    drive(policy, layout, seed, reclaim)
    assert decisions, "nothing was decided"


@settings(deadline=None, max_examples=30)
@given(**SHAPES, lines=st.integers(0, 3), parts=st.integers(1, 4))
def test_alone_a_token_is_worth_its_own_change(
    seed, prefix, cols, line_break, reclaim, lines, parts
):
    layout = RasterLayout(rows=6, cols=cols, prefix=prefix, line_break=line_break)
    checked = []

    class Watched(Linear2D):
        def victims(self, view, count):
            worth = change_alone(view, lines)
            for batch, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
                held = view.positions[batch, head] >= 0
                values = view.values[batch, head].double()
                unit = (values - values.mean(0)).abs().max()
                want = (changes(view, batch, head, lines) / unit).square().sum((0, 2)).float()
                torch.testing.assert_close(
                    worth[batch, head, held], want[held], rtol=1e-3, atol=1e-5
                )
            checked.append(count)
            return super().victims(view, count)

    drive(Watched(anchors=1, recent=1, parts=parts), layout, seed, reclaim)
    assert checked, "nothing was decided"


def test_many_sequences_are_decided_part_by_part(monkeypatch):
    layout = RasterLayout(rows=6, cols=4, prefix=1)
    whole = drive(Linear2D(anchors=1), layout, 3).positions(0)
    monkeypatch.setattr("kvpolicy.ops.portions.NEAR", 1)
    monkeypatch.setattr("kvpolicy.ops.portions._ELSEWHERE", 1)
    assert torch.equal(whole, drive(Linear2D(anchors=1), layout, 3).positions(0))


def test_tokens_that_say_the_same_are_worth_more_than_each_alone():
    """Two of little mass and the same value: alone either could go, together they can't."""
    mass = torch.tensor([0.5, 0.1, 0.1, 0.14, 0.16])
    values = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -2.8]])
    read = mass @ values
    change = mass[:, None] * (read - values)

    def cost(slots):
        return float(change[list(slots)].sum(0).square().sum())

    alone = sorted(range(5), key=lambda slot: cost([slot]))[:2]
    best = min(combinations(range(5), 2), key=cost)
    assert cost(best) < cost(alone)  # so the order of single costs is not enough


def test_mass_moves_down_with_the_lines():
    layout = RasterLayout(rows=6, cols=3, prefix=1)
    scored = []

    class Watched(Linear):
        def score(self, view):
            own = moving_mass(view, 0.5)
            for batch, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
                positions, mass = view.positions[batch, head], view.mass[batch, head]
                want = mass + 0.5 * moved(positions, mass, layout, 1).float()
                torch.testing.assert_close(own[batch, head], want)
            scored.append(view.seen)
            return own

    drive(Watched(anchors=1, recent_lines=0), layout, 1)
    assert scored, "nothing was decided"


@pytest.mark.parametrize("size", [2.0**-100, 2.0**60, 2.0**100])
def test_how_large_values_are_changes_nothing(size):
    """Even where their squares are too large, or too small, for a float32."""
    layout = RasterLayout(rows=6, cols=4, prefix=2)
    held = []
    for scale in (1.0, size):
        cache = PolicyCache(Linear2D(anchors=3), 15, layout=layout, num_layers=1)
        draw = torch.Generator().manual_seed(0)
        for _ in range(layout.length):
            query, key, value = (torch.randn(2, 2, 1, 4, generator=draw) for _ in range(3))
            cache.attend(0, query, key, value * scale)
        held.append(cache.positions(0).sort(-1).values)
    assert torch.equal(*held)


def test_lines_below_none_are_refused():
    with pytest.raises(ParameterError, match="lines=-1"):
        kvpolicy.create("linear2d", lines=-1)


@settings(deadline=None, max_examples=30)
@given(cols=st.integers(2, 7), line_break=st.integers(0, 1), parts=st.integers(1, 8))
def test_it_decides_where_a_part_of_a_line_begins_for_that_part(cols, line_break, parts):
    layout = RasterLayout(rows=7, cols=cols, prefix=2, line_break=line_break)
    line, decided = layout.line_length, []

    class Watched(Linear2D):
        def victims(self, view, count):
            decided.append((view.seen, count))
            return super().victims(view, count)

    drive(Watched(anchors=1, parts=parts), layout, 0, more=0)
    size = -(-line // parts)
    starts = [at for row in range(7) for at in range(row * line, row * line + line, size)]
    # Behind the first decision, where the cache has just filled up.
    first = decided[0][0] - layout.prefix
    want = [at for at in starts if at > first]
    assert [seen - layout.prefix for seen, _ in decided[1:]] == want
    for seen, count in decided[1:]:
        column = (seen - layout.prefix) % line
        assert count == min(size, line - column)
