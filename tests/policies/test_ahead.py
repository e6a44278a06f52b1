"""ahead's choice, against a plain reading of its formula; the rest is the suite's."""

import pytest
import torch

import kvpolicy
from kvpolicy import OrderedLayout, PolicyCache, RasterLayout
from kvpolicy.parts.named import read_part
from kvpolicy.policies import Ahead, ahead
from kvpolicy.policies.ahead import least_change_ahead

GRID = RasterLayout(rows=4, cols=5, prefix=2)
ORDERED = OrderedLayout.locality_aware(GRID, 9, seed=3)
LAYOUTS = {"ordered": ORDERED, "raster": GRID}


def looks(view, layout, horizon, fall):
    """``A[t, j]`` of one head after the other, from rows and columns, float64 ``[B, H, T, S]``."""
    place = getattr(layout, "place", int)
    cells = [divmod(place(p) - layout.prefix, GRID.cols) for p in range(layout.length)]
    coming = range(view.seen, min(view.seen + horizon, layout.length))
    found = torch.zeros(*view.positions.shape[:2], len(coming), view.positions.shape[2]).double()
    for batch, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        for slot, position in enumerate(view.positions[batch, head].tolist()):
            if position >= layout.prefix:
                for row, token in enumerate(coming):
                    away = torch.dist(
                        *map(torch.tensor, map(_floats, (cells[token], cells[position])))
                    )
                    found[batch, head, row, slot] = away**-fall
    return found / found.sum(-1, keepdim=True)


def _floats(cell):
    return [float(number) for number in cell]


def changes(view, read):
    """What each slot adds to what each coming token reads if it goes, ``[B, H, T, S, D]``."""
    values = view.values.double().unsqueeze(2)
    output = (read.unsqueeze(-1) * values).sum(3, keepdim=True)
    return read.unsqueeze(-1) * (output - values)


def decided(layout, *, horizon=6, fall=3.0, calls=1, how="alone"):
    """Run a generation, and hold each decision against the formula; how many there were."""
    decisions = []

    class Watched(Ahead):
        def victims(self, view, count):
            chosen = super().victims(view, count)
            if how == "together":
                protected = self.protect(view)
                chosen = least_change_ahead(view, count, protected, horizon, fall, how)
            change = changes(view, looks(view, layout, horizon, fall))
            free = (view.positions >= layout.prefix) & ~self.protect(view)
            for batch, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
                gone = torch.zeros_like(change[batch, head, :, 0])
                left = set(free[batch, head].nonzero().flatten().tolist())
                for slot in chosen[batch, head].tolist():
                    costs = {
                        other: float((gone + change[batch, head, :, other]).square().sum())
                        for other in left
                    }
                    assert costs[slot] <= min(costs.values()) * (1 + 1e-4) + 1e-7
                    if how == "together":
                        gone += change[batch, head, :, slot]
                    left.remove(slot)
            decisions.append(count)
            return chosen

    policy = Watched(anchors=1, horizon=horizon, fall=fall)
    cache = PolicyCache(policy, 8, layout=layout, num_layers=1)
    draw = torch.Generator().manual_seed(5)
    done = 0
    while done < layout.length:
        count = min(calls, layout.length - done)
        cache.attend(0, *(torch.randn(2, 2, count, 4, generator=draw) for _ in range(3)))
        done += count
    return len(decisions)


@pytest.mark.parametrize("how", ["alone", "together"])
@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_victim_changes_least(name, calls, how):
    assert decided(LAYOUTS[name], calls=calls, how=how) >= 3


def _by_arrival(right):
    """Places are taken to be where tokens would be if they came line by line."""
    return lambda layout, *rest: right(layout.grid, *rest)


def _by_order_read_backwards(right):
    class Backwards(OrderedLayout):
        def place(self, position):
            return super().arrival(position)

    return lambda layout, *rest: right(
        Backwards(grid=layout.grid, order=layout.order, groups=layout.groups), *rest
    )


def _from_the_past(right):
    """The newest tokens are taken for those that come."""
    return lambda layout, seen, first, end: right(layout, seen, first - 1, end - 1).clamp(min=1)


@pytest.mark.parametrize("mutant", [_by_arrival, _by_order_read_backwards, _from_the_past])
def test_arrival_is_not_taken_for_the_grid(monkeypatch, mutant):
    """What these would keep is not what the formula says: the test above sees the difference."""
    monkeypatch.setattr(ahead, "squared_distances", mutant(ahead.squared_distances))
    with pytest.raises(AssertionError):
        decided(ORDERED)


def test_what_its_neighbours_say_as_well_goes_first():
    """Nearer than another, but of no other value than what lies about it: mass would keep it."""
    layout = OrderedLayout(grid=RasterLayout(rows=1, cols=6), order=(0, 2, 3, 5, 4, 1))
    values = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    held = {}
    for how in ("alone", "mass"):
        policy = kvpolicy.create(f"compose/score=change_ahead:1:1.0:{how}")
        cache = PolicyCache(policy, 4, layout=layout, num_layers=1)
        for token in range(5):
            value = values[min(token, 3)].view(1, 1, 1, 2)
            cache.attend(0, *torch.zeros(2, 1, 1, 1, 2), value)
        held[how] = {layout.order[p] for p in cache.positions(0).flatten().tolist()}
    # Before 4 comes: 0 is farthest from it (1/4 of what 3 is given), but it alone says something
    # else. 2 is given least of those that say the same.
    assert held == {"alone": {0, 3, 5, 4}, "mass": {2, 3, 5, 4}}


def test_nothing_is_watched():
    assert Ahead().observers(None) == ()
    assert not Ahead().raster_only


@pytest.mark.parametrize(
    "given", ["change_ahead:0", "change_ahead:4:-1.0", "change_ahead:4:4.0:all"]
)
def test_what_the_part_does_not_take_is_refused(given):
    with pytest.raises(kvpolicy.ParameterError, match="change_ahead"):
        read_part("score", given)
