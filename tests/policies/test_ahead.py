"""ahead's choice, against a plain reading of its formula; the rest is the suite's."""

import json

import pytest
import torch

import kvpolicy
from kvpolicy import OrderedLayout, PolicyCache, RasterLayout
from kvpolicy.parts.named import read_part
from kvpolicy.parts.offsets import HeadOffsets, OffsetAttention
from kvpolicy.policies import Ahead, ahead
from kvpolicy.policies.ahead import least_change_ahead

GRID = RasterLayout(rows=4, cols=5, prefix=2)
ORDERED = OrderedLayout.locality_aware(GRID, 9, seed=3)
LAYOUTS = {"ordered": ORDERED, "raster": GRID}


FAR = 0.02

#: Two layers of two heads: one looks up, one everywhere, one right, one down and left.
MEASURED = OffsetAttention(
    subject="toy",
    layout="",
    queries=9,
    radius=1,
    layers=[
        [
            HeadOffsets(near=[[0.1, 0.9, 0.2], [0, 0, 0], [0, 0.3, 0]], far=0.01),
            HeadOffsets(near=[[0.2] * 3] * 3, far=0.2),
        ],
        [
            HeadOffsets(near=[[0, 0, 0.1], [0, 0, 1], [0, 0, 0.4]], far=0.0),
            HeadOffsets(near=[[0, 0, 0], [0, 0, 0], [0.7, 0.1, 0]], far=0.3),
        ],
    ],
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "offsets.json"
    path.write_text(MEASURED.text())
    return str(path)


def looks(view, layout, horizon, fall, offsets=None):
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
                    given = float(away) ** -fall + FAR
                    if offsets is not None:
                        of_head = offsets.layers[view.layer][head]
                        down, across = (
                            b - a for a, b in zip(cells[token], cells[position], strict=True)
                        )
                        near = max(abs(down), abs(across)) <= 1
                        seen = of_head.near[1 + down][1 + across] if near else of_head.far
                        given = seen + given / 10
                    found[batch, head, row, slot] = given
    return found / found.sum(-1, keepdim=True)


def _floats(cell):
    return [float(number) for number in cell]


def changes(view, read):
    """What each slot adds to what each coming token reads if it goes, ``[B, H, T, S, D]``."""
    values = view.values.double().unsqueeze(2)
    output = (read.unsqueeze(-1) * values).sum(3, keepdim=True)
    return read.unsqueeze(-1) * (output - values)


def decided(layout, *, horizon=6, fall=3.0, calls=1, how="alone", file=None):
    """Run a generation, and hold each decision against the formula; how many there were."""
    decisions = []

    class Watched(Ahead):
        def victims(self, view, count):
            chosen = super().victims(view, count)
            if how == "together":
                protected = self.protect(view)
                chosen = least_change_ahead(
                    view, count, protected, horizon, fall, how, FAR, self.offsets
                )
            offsets = None if file is None else MEASURED
            change = changes(view, looks(view, layout, horizon, fall, offsets))
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

    policy = Watched(anchors=1, horizon=horizon, fall=fall, far=FAR, offsets=file)
    cache = PolicyCache(policy, 8, layout=layout, num_layers=2)
    draw = torch.Generator().manual_seed(5)
    done = 0
    while done < layout.length:
        count = min(calls, layout.length - done)
        for layer in range(2):
            cache.attend(layer, *(torch.randn(2, 2, count, 4, generator=draw) for _ in range(3)))
        done += count
    return len(decisions) // 2


@pytest.mark.parametrize("how", ["alone", "together"])
@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("measured", [False, True])
def test_each_victim_changes_least(name, calls, how, measured, file):
    found = decided(LAYOUTS[name], calls=calls, how=how, file=file if measured else None)
    assert found >= 3


@pytest.mark.parametrize(
    "mutant",
    [
        lambda right: lambda self, layer, *rest: right(self, 1 - layer, *rest),
        lambda right: lambda *given: right(*given).flip(0),
        lambda right: lambda self, layer, layout, *rest: right(self, layer, layout.grid, *rest),
        lambda right: lambda self, *rest: right(_turned(self), *rest),
    ],
    ids=["another layer's", "another head's", "by arrival", "above for below"],
)
def test_offsets_of_another_place_would_be_seen(monkeypatch, mutant, file):
    monkeypatch.setattr(OffsetAttention, "given", mutant(OffsetAttention.given))
    with pytest.raises(AssertionError):
        decided(ORDERED, file=file)


def _turned(offsets):
    layers = [
        [head.model_copy(update={"near": head.near[::-1]}) for head in heads]
        for heads in offsets.layers
    ]
    return offsets.model_copy(update={"layers": layers})


def test_offsets_are_a_file_that_is_named_kept_and_spelled(file):
    policy = kvpolicy.create("ahead", offsets=file)
    assert policy.offsets.found == MEASURED
    assert policy.model_dump()["offsets"] == file
    again = Ahead.model_validate_json(policy.model_dump_json())
    assert again == policy
    assert again.offsets.found == MEASURED
    part = read_part("score", f"change_ahead:4:4.0:alone:0.003:{file}")
    assert part.parameters.offsets.found == MEASURED
    assert str(part).endswith(file)
    assert read_part("score", str(part)).parameters == part.parameters
    assert str(read_part("score", "change_ahead")).endswith(":alone:0.003")


@pytest.mark.parametrize("spelled", ["policy", "composition"])
def test_offsets_of_another_model_are_refused_where_the_cache_is_made(spelled, file):
    policy = Ahead(offsets=file)
    if spelled == "composition":
        policy = kvpolicy.compose(policy, protect="anchors:1")
    with pytest.raises(kvpolicy.ParameterError, match=r"of toy are of 2 layers, .* has 3; run"):
        PolicyCache(policy, 8, layout=GRID, num_layers=3)
    PolicyCache(policy, 8, layout=GRID, num_layers=2)


def test_offsets_of_other_heads_or_layers_are_refused_by_the_part(file):
    for layers, heads, words in (
        (2, 4, "2 KV heads in layer 0, and this cache has 4"),
        (1, 2, "2 layers"),
    ):
        policy = kvpolicy.create(f"ahead/score=change_ahead:4:4.0:alone:0.003:{file}")
        cache = PolicyCache(policy, 8, layout=GRID, num_layers=layers)
        with pytest.raises(kvpolicy.ParameterError, match=words):
            for layer in range(layers):
                cache.attend(layer, *torch.randn(3, 1, heads, 20, 4))


def test_layers_may_have_other_numbers_of_heads(tmp_path):
    heads = MEASURED.layers
    found = MEASURED.model_copy(update={"layers": [heads[0], [heads[1][0]]]})
    path = tmp_path / "offsets.json"
    path.write_text(found.text())
    cache = PolicyCache(Ahead(offsets=str(path)), 8, layout=GRID, num_layers=2)
    for _ in range(GRID.length - 1):
        for layer, count in enumerate((2, 1)):
            cache.attend(layer, *torch.randn(3, 1, count, 1, 4))
    assert cache.stats().evictions[1] > 0
    cache.reset()
    with pytest.raises(kvpolicy.ParameterError, match=r"1 KV heads in layer 1, .* has 2"):
        for _ in range(GRID.length - 1):
            for layer in range(2):
                cache.attend(layer, *torch.randn(3, 1, 2, 1, 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "kvpolicy layer budgets"}, "is no file of offsets"),
        ({"radius": 2}, r"layers\[0\]\[0\].near is not 5 rows of 5 numbers"),
        ({"layers": []}, "layers"),
        ({"layers": [[]]}, "layers"),
        ({"layers": [[{"near": [[2.0]], "far": 0.1}]], "radius": 0}, "layers"),
        ({"queries": 0}, "queries"),
        ({"more": 1}, "more"),
        ({"version": 2}, "version"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, change, words):
    path = tmp_path / "offsets.json"
    path.write_text(json.dumps(MEASURED.model_dump() | change))
    with pytest.raises(kvpolicy.ParameterError, match=words):
        Ahead(offsets=str(path))


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(
        kvpolicy.ParameterError, match=r"'ahead': offsets='[^']*': offsets [^ ]* can't be read"
    ):
        Ahead(offsets=str(tmp_path / "nowhere.json"))
    (tmp_path / "text").write_text("[")
    with pytest.raises(kvpolicy.ParameterError, match="is not JSON"):
        Ahead(offsets=str(tmp_path / "text"))


def test_four_digits_are_kept(tmp_path):
    near = [[0.123456789]]
    found = MEASURED.model_copy(
        update={"radius": 0, "layers": [[HeadOffsets(near=near, far=1.23456e-7)]]}
    )
    path = tmp_path / "offsets.json"
    path.write_text(found.text())
    (read,) = Ahead(offsets=str(path)).offsets.found.layers[0]
    assert (read.near, read.far) == ([[0.1235]], 1.235e-7)


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
        policy = kvpolicy.create(f"compose/score=change_ahead:1:1.0:{how}:0")
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
    "given",
    ["change_ahead:0", "change_ahead:4:-1.0", "change_ahead:4:4.0:all", "change_ahead:4:4:alone:2"],
)
def test_what_the_part_does_not_take_is_refused(given):
    with pytest.raises(kvpolicy.ParameterError, match="change_ahead"):
        read_part("score", given)
