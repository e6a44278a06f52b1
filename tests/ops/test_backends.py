"""Every operation's C++ kernel against the plain torch that does the same without it."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.kernel_library import needs_compiler
from support.turns import in_turn

import kvpolicy
from kvpolicy.ops import change, rank
from kvpolicy.ops.cpu import native
from kvpolicy.ops.key_lengths import UNKNOWN, find_unknown, lengths
from kvpolicy.ops.locality import is_local
from kvpolicy.ops.moving import moved
from kvpolicy.ops.pool import pool
from kvpolicy.ops.priorities import priorities
from kvpolicy.ops.redundancy import cosines, redundancy

pytestmark = needs_compiler

INF = float("inf")
LARGEST = torch.finfo(torch.float32).max
#: Few of them, so that ties are many.
WORTH = torch.tensor([-INF, -LARGEST, -2.0, -1e-45, -0.0, 0.0, 1.0, 1.0, 2.0, LARGEST, INF])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PREFIX = 2


class Counted:
    """The operators, and which of them were asked for."""

    def __init__(self, operators):
        self.operators = operators
        self.used = set()

    def __getattr__(self, name):
        self.used.add(name)
        return getattr(self.operators, name)


def both(operators, name, function):
    """What a function gives with the kernel of this name, and without any."""
    counted = Counted(operators)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "operators", lambda: counted)
        one = function()
        patch.setattr(native, "operators", lambda: None)
        other = function()
    assert counted.used == {name}
    return one, other


def drawn(seed, *, dim=8, dtype=torch.float32, empty=0.0, spare=0, alike=0.0, size=(2, 3, 30)):
    """A layer that has seen tokens: the prefix in the first slots, the others anywhere.

    Of a store that is longer by ``spare`` slots, so that nothing here is contiguous.
    """
    chance = torch.Generator().manual_seed(seed)
    batch, heads, held = size
    slots = held + spare
    tokens = torch.randn(2, batch, heads, slots, dim, generator=chance, dtype=torch.float32)
    for each in tokens:  # some tokens are what others are
        same = torch.randint(0, slots, (batch, heads, slots), generator=chance)
        same = torch.where(
            torch.rand(same.shape, generator=chance) < alike, same, torch.arange(slots)
        )
        each.copy_(each.gather(2, same.unsqueeze(-1).expand_as(each)))
    positions = torch.empty(batch, heads, slots, dtype=torch.int32)
    seen = 3 * slots
    for head in positions.view(-1, slots):
        rest = torch.randperm(seen - PREFIX, generator=chance) + PREFIX
        head[:] = torch.cat([torch.arange(PREFIX), rest[: slots - PREFIX]])
    if empty:
        positions[torch.rand(batch, heads, slots, generator=chance) < empty] = -1
    mass = torch.rand(batch, heads, slots, generator=chance)
    mass *= torch.rand(mass.shape, generator=chance) < 0.7  # many are worth nothing
    positions, mass = positions[..., :held], mass[..., :held]
    pinned = positions < PREFIX
    return SimpleNamespace(
        keys=tokens[0].to(dtype)[:, :, :held],
        values=tokens[1].to(dtype)[:, :, :held],
        positions=positions,
        mass=mass,
        seen=seen,
        empty=positions < 0,
        pinned=pinned,
        where={"prefix": PREFIX, "pinned": pinned if empty else None, "may_be_empty": empty > 0},
    )


def lines_of(layer, lines):
    """Masses of lines to come."""
    return moved(
        layer.mass, layer.positions, lines=lines, line_length=6, prefix=PREFIX, seen=layer.seen
    )


def where(layer, slots):
    """Positions of these slots: which of several empty ones goes does not matter."""
    return layer.positions.gather(2, slots)


VIEWS = {
    "seed": st.integers(0, 10**6),
    "empty": st.sampled_from([0.0, 0.3, 0.9]),
    "spare": st.sampled_from([0, 3]),
    "held": st.sampled_from([3, 15, 16, 17, 47, 97]),
}
EXAMPLES = settings(deadline=None, max_examples=60)


@EXAMPLES
@given(**VIEWS, protect=st.sampled_from([None, 0.0, 0.5, 1.0]), data=st.data())
def test_the_lowest_go_first(operators, seed, empty, spare, held, protect, data):
    layer = drawn(seed, empty=empty, spare=spare, size=(2, 3, held))
    chance = torch.Generator().manual_seed(seed)
    shape = layer.positions.shape
    score = WORTH[torch.randint(0, len(WORTH), shape, generator=chance)]
    if data.draw(st.booleans()):  # one for all heads
        score = score[:, :1]
    protected = None if protect is None else torch.rand(shape, generator=chance) < protect
    count = data.draw(st.sampled_from([1, 1, 2, 8, held]).filter(lambda count: count <= held))
    ask = lambda: rank.lowest(score, layer.positions, count, protected=protected, **layer.where)  # noqa: E731
    (one, numbers), (other, _) = both(operators, "lowest", ask)
    assert numbers
    assert one.dtype == torch.int64
    assert torch.equal(where(layer, one), where(layer, other))
    assert all(len(set(row)) == count for row in one.flatten(0, 1).tolist())


@EXAMPLES
@given(**VIEWS, protect=st.sampled_from([None, 0.5]), count=st.integers(1, 3))
def test_ranks_are_followed(operators, seed, empty, spare, held, protect, count):
    layer = drawn(seed, empty=empty, spare=spare, size=(2, 3, held))
    chance = torch.Generator().manual_seed(seed)
    shape = layer.positions.shape
    protected = None if protect is None else torch.rand(shape, generator=chance) < protect
    terms = {"protected": protected, **layer.where}
    (one, _), (other, _) = both(
        operators, "lowest", lambda: rank.lowest(layer.positions, layer.positions, count, **terms)
    )
    assert torch.equal(where(layer, one), where(layer, other))


@EXAMPLES
@given(**VIEWS, place=st.integers(0, 96), protect=st.booleans())
def test_nan_is_told_alike(operators, seed, empty, spare, held, place, protect):
    """Wherever it counts: not in the prefix, and not where nothing is."""
    layer = drawn(seed, empty=empty, spare=spare, size=(2, 3, held))
    score = torch.rand(layer.positions.shape)
    score[1, 2, place % held] = math.nan
    protected = torch.ones_like(score, dtype=torch.bool) if protect else None
    terms = {"protected": protected, **layer.where}
    (_, one), (_, other) = both(
        operators, "lowest", lambda: rank.lowest(score, layer.positions, 1, **terms)
    )
    assert one == other
    assert one == (layer.positions[1, 2, place % held] < PREFIX)


@EXAMPLES
@given(
    **VIEWS,
    kernel=st.sampled_from([1, 3, 5, 9]),
    window=st.sampled_from([0, 1, 40]),
    how=st.sampled_from(["mean", "max"]),
    share=st.booleans(),
)
def test_neighbours_are_pooled(operators, seed, empty, spare, held, kernel, window, how, share):
    layer = drawn(seed, empty=empty, spare=spare, size=(2, 3, held))
    terms = {"newest": layer.seen - window, "kernel": kernel, "how": how, "share": share}
    one, other = both(operators, "pool", lambda: pool(layer.mass, layer.positions, **terms))
    if share:  # a sum of many
        torch.testing.assert_close(one[~layer.empty], other[~layer.empty])
    else:
        assert torch.equal(one[~layer.empty], other[~layer.empty])


@EXAMPLES
@given(
    **VIEWS,
    alike=st.sampled_from([0.0, 0.5, 1.0]),
    similar=st.sampled_from([-1.0, -0.3, 0.0, 0.3, 0.5, 0.9]),
    dim=st.sampled_from([1, 8, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    operation=st.sampled_from([cosines, redundancy]),
)
def test_cosines_are_added(
    operators, seed, empty, spare, held, alike, similar, dim, dtype, operation
):
    """A cosine that is ``similar`` but for its last digits is no matter of either."""
    layer = drawn(
        seed, empty=empty, spare=spare, size=(2, 3, held), alike=alike, dim=dim, dtype=dtype
    )
    out = layer.empty | layer.pinned
    keys = layer.keys.double()
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosine = unit @ unit.transpose(2, 3)
    assume((cosine - similar).abs().min() > 1e-6)
    one, other = both(
        operators,
        operation.__name__,
        lambda: operation(layer.keys, layer.positions, out, similar=similar),
    )
    torch.testing.assert_close(one[~out], other[~out], rtol=1e-5, atol=2e-5)


def cosines_of(operators, layer):
    return both(
        operators,
        "cosines",
        lambda: cosines(layer.keys, layer.positions, layer.pinned, similar=0.5),
    )


def test_equal_keys_are_equally_redundant(operators):
    """To the last bit, wherever they lie, or the older of them would not go."""
    layer = drawn(3, size=(1, 1, 97), dim=64)
    layer.keys[:] = layer.keys[:, :, 40:41].clone()
    layer.keys[:, :, 5] *= -1
    one, _ = cosines_of(operators, layer)
    alike = one[0, 0, [slot for slot in range(2, 97) if slot != 5]]
    assert len(set(alike.tolist())) <= 3  # but for the newest, whom others leave out


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_keys_that_are_not_finite_are_refused(operators, bad):
    layer = drawn(3, size=(1, 1, 20))
    layer.keys[0, 0, 7, 1] = bad
    for each in cosines_of(operators, layer):
        assert each[0, 0, 2:].isnan().any()


def test_keys_too_long_for_their_length_are_like_none(operators):
    layer = drawn(3, size=(1, 1, 20))
    layer.keys[0, 0, 7] = 1e30
    one, other = cosines_of(operators, layer)
    torch.testing.assert_close(one, other)
    assert one[0, 0, 7] == 0


@EXAMPLES
@given(
    **VIEWS,
    alike=st.sampled_from([0.0, 0.5]),
    lines=st.sampled_from([0, 1, 5]),
    dim=st.sampled_from([1, 8, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e30]),
)
def test_changes_are_foreseen(operators, seed, empty, spare, held, alike, lines, dim, dtype, scale):
    layer = drawn(
        seed, empty=empty, spare=spare, size=(2, 3, held), alike=alike, dim=dim, dtype=dtype
    )
    if dtype is torch.float32:
        layer.values.mul_(scale)
    mass = lines_of(layer, lines)
    one, other = both(operators, "change_alone", lambda: change.alone(layer.values, mass))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    nothing = (mass == 0).all(2)
    assert (one[nothing] == 0).all()  # exactly, so that the oldest of them goes first


@EXAMPLES
@given(
    **VIEWS,
    alike=st.sampled_from([0.0, 0.5]),
    lines=st.sampled_from([0, 1, 5]),
    dim=st.sampled_from([1, 8, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_the_same_set_changes_least(
    operators, seed, empty, spare, held, alike, lines, dim, dtype, data
):
    """As long as no two slots cost the same but for the last digits."""
    layer = drawn(
        seed, empty=empty, spare=spare, size=(2, 3, held), alike=alike, dim=dim, dtype=dtype
    )
    mass = lines_of(layer, lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "operators", lambda: None)
        cost = change.alone(layer.values, mass)
    cost = rank.leveled(cost, layer.positions, pinned=layer.pinned)
    count = data.draw(st.integers(1, held - PREFIX))
    one, other = both(
        operators,
        "change_together",
        lambda: change.together(layer.values, mass, cost, layer.positions, count),
    )
    assert all(len(set(row)) == count for row in one.flatten(0, 1).tolist())
    values, read = change.foreseen(layer.values, mass)
    of_pairs = change.changes(mass.double(), values.double(), read.double())
    start = cost.double()
    for head in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        at = tuple(head)
        now = start[at].clone()
        for mine, theirs in zip(one[at].tolist(), other[at].tolist(), strict=True):
            if layer.positions[at][mine] != layer.positions[at][theirs]:
                torch.testing.assert_close(now[mine], now[theirs], rtol=1e-4, atol=1e-5)
                break
            now += 2 * of_pairs[at][mine]
            now[mine] = INF


@EXAMPLES
@given(
    **VIEWS,
    window=st.integers(1, 200),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    few=st.booleans(),
)
def test_heads_are_of_the_same_kind(operators, seed, empty, spare, held, window, share, few):
    layer = drawn(seed, empty=empty, spare=spare, size=(2, 3, held))
    if few:  # all mass on one token
        layer.mass.mul_(layer.positions == layer.positions.amax(-1, keepdim=True))
    terms = {"seen": layer.seen, "window": window, "share": share, **layer.where}
    one, other = both(operators, "is_local", lambda: is_local(layer.mass, layer.positions, **terms))
    assert torch.equal(one, other)


@EXAMPLES
@given(
    **VIEWS,
    forgotten=st.integers(0, 5),
    dim=st.sampled_from([1, 8, 40, 64]),
    dtype=st.sampled_from(DTYPES),
)
def test_lengths_are_found(operators, seed, empty, spare, held, forgotten, dim, dtype):
    """Those that are not known; the others are left as they are."""
    layer = drawn(seed, empty=empty, spare=spare, size=(2, 3, held), dim=dim, dtype=dtype)
    chance = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, held, (2, 3, forgotten), generator=chance)

    def found(before):
        reading = torch.full((2, 3, held + spare), 7.0)[..., :held]
        reading.copy_(before).scatter_(2, slots, UNKNOWN)
        find_unknown(layer.keys, reading, forgotten)
        return reading

    known = lengths(layer.keys)
    one, other = both(operators, "key_lengths", lambda: found(known))
    torch.testing.assert_close(one, other)
    nan = torch.full_like(known, math.nan)
    one, _ = both(operators, "key_lengths", lambda: found(nan))
    forgot = torch.zeros_like(one, dtype=torch.bool).scatter(2, slots, True)
    torch.testing.assert_close(one[forgot], other[forgot])
    assert one[~forgot].isnan().all()


@EXAMPLES
@given(**VIEWS, lot=st.integers(0, 2**51))
def test_the_same_lots_are_drawn(operators, seed, empty, spare, held, lot):
    layer = drawn(seed, empty=empty, spare=spare, size=(2, 3, held))
    one, other = both(operators, "priorities", lambda: priorities(layer.positions, lot))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "dtype", "reclaim"),
    in_turn(
        [name for name in kvpolicy.available() if name not in ("compose", "full")],
        DTYPES,
        turn=["lazy", "eager"],
    ),
)
def test_every_policy_decides_as_without_them(operators, name, dtype, reclaim):
    """A whole stream; attention is torch's in both, so that readings are the same bit for bit."""
    policy = kvpolicy.create(name, **({"anchors": 3} if name in ("linear", "linear2d") else {}))

    def held():
        layout = kvpolicy.RasterLayout(rows=9, cols=6, prefix=2)
        cache = kvpolicy.PolicyCache(policy, 34, layout=layout, num_layers=2, reclaim=reclaim)
        chance = torch.Generator().manual_seed(7)
        kept = []
        for _ in range(layout.length):
            query = torch.randn(3, 4, 1, 16, generator=chance).to(dtype)
            key, value = (torch.randn(3, 2, 1, 16, generator=chance).to(dtype) for _ in range(2))
            for layer in range(2):
                cache.attend(layer, query, key, value)
                kept.append(cache.positions(layer).sort(-1).values)
        return kept

    counted = Counted(operators)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "decoder", lambda dtype: None)
        patch.setattr(native, "operators", lambda: counted)
        one = held()
        patch.setattr(native, "operators", lambda: None)
        other = held()
    assert counted.used
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(1, requires_grad=True),
        torch.zeros(1, device="meta"),
        torch.nn.Parameter(torch.zeros(1), requires_grad=False),
    ],
    ids=["gradient", "another device", "subclass"],
)
def test_no_kernel_serves_these(operators, monkeypatch, other):
    monkeypatch.setattr(native, "operators", lambda: operators)
    assert native.serving("lowest", torch.zeros(1)) is not None
    assert native.serving("lowest", other) is None


def test_keys_of_float64_are_left_to_torch(operators, monkeypatch):
    monkeypatch.setattr(native, "operators", lambda: Counted(operators))
    layer = drawn(1, dtype=torch.float64)
    found = cosines(layer.keys, layer.positions, layer.pinned, similar=0.5)
    same = cosines(layer.keys.float(), layer.positions, layer.pinned, similar=0.5)
    torch.testing.assert_close(found, same)


@pytest.mark.parametrize("native_code", [True, False])
def test_a_mask_that_is_no_mask_is_refused(operators, monkeypatch, native_code):
    monkeypatch.setattr(native, "operators", lambda: operators if native_code else None)
    layer = drawn(1)
    with pytest.raises(kvpolicy.ShapeError, match=r"protected must be bool, not torch\.int32"):
        rank.lowest(layer.mass, layer.positions, 1, protected=layer.positions)
