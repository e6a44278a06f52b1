"""The CPU kernels that choose: each against the torch code that does the same without them."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.kernel_library import needs_compiler
from torch import Tensor

import kvpolicy
from kvpolicy.ops import rank as ranking
from kvpolicy.ops.cpu import native
from kvpolicy.parts import LeastChange, least_change
from kvpolicy.parts.key_lengths import KeyLengths, lengths
from kvpolicy.parts.moving import moved
from kvpolicy.parts.score import pool
from kvpolicy.policies.random import Lots
from kvpolicy.policies.rkv import NotRedundant
from kvpolicy.policies.ssd import ByHead
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape, SlotStore

pytestmark = needs_compiler

INF = float("inf")
LARGEST = torch.finfo(torch.float32).max
#: Few of them, so that ties are many.
WORTH = torch.tensor([-INF, -LARGEST, -2.0, -1e-45, -0.0, 0.0, 1.0, 1.0, 2.0, LARGEST, INF])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUT = kvpolicy.RasterLayout(rows=40, cols=6, prefix=2)


class Reading:
    """An observer that was told its reading."""

    def __init__(self, mass):
        self.mass = mass


class Given(ScoredPolicy):
    """A policy whose scores and protection are given."""

    tables: ClassVar[tuple[Tensor, Tensor | None]]

    def protect(self, view):
        return self.tables[1]

    def score(self, view):
        return self.tables[0]


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


def drawn_view(seed, *, dim=8, dtype=torch.float32, empty=0.0, spare=0, alike=0.0, size=(2, 3, 30)):
    """A layer that has seen tokens: the prefix in the first slots, the others anywhere."""
    chance = torch.Generator().manual_seed(seed)
    batch, heads, held = size
    slots = held + spare
    shape = SlotShape(batch, heads, slots, torch.device("cpu"), LAYOUT)
    tokens = [
        torch.randn(batch, heads, slots, dim, generator=chance, dtype=torch.float32)
        for _ in range(2)
    ]
    for each in tokens:  # some tokens are what others are
        same = torch.randint(0, slots, (batch, heads, slots), generator=chance)
        same = torch.where(
            torch.rand(same.shape, generator=chance) < alike, same, torch.arange(slots)
        )
        each.copy_(each.gather(2, same.unsqueeze(-1).expand_as(each)))
    store = SlotStore(shape, *(each.to(dtype) for each in tokens))
    store.keys.copy_(tokens[0])
    store.values.copy_(tokens[1])
    seen = 3 * slots
    for batch_at in range(batch):
        for head in range(heads):
            rest = torch.randperm(seen - LAYOUT.prefix, generator=chance) + LAYOUT.prefix
            store.positions[batch_at, head] = torch.cat(
                [torch.arange(LAYOUT.prefix), rest[: slots - LAYOUT.prefix]]
            )
    if empty:
        store.positions[torch.rand(batch, heads, slots, generator=chance) < empty] = -1
    store.fresh = spare
    mass = torch.rand(batch, heads, slots, generator=chance)
    mass *= torch.rand(mass.shape, generator=chance) < 0.7  # many are worth nothing
    return CacheView(
        store,
        [Reading(mass)],
        seen=seen,
        room=0,
        layer=3,
        num_layers=4,
        budget=slots - LAYOUT.prefix,
        layout=LAYOUT,
        may_be_empty=empty > 0,
        first_head=5,
    )


def where(view, slots):
    """Positions of these slots: which of several empty ones goes does not matter."""
    return view.positions.gather(2, slots)


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
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held))
    chance = torch.Generator().manual_seed(seed)
    shape = view.positions.shape
    score = WORTH[torch.randint(0, len(WORTH), shape, generator=chance)]
    if data.draw(st.booleans()):  # heads that are one in memory
        score = score[:, :1].expand(shape)
    protected = None if protect is None else torch.rand(shape, generator=chance) < protect
    count = data.draw(st.sampled_from([1, 1, 2, 8, held]).filter(lambda count: count <= held))
    policy = Given()
    Given.tables = score, protected
    one, other = both(operators, "lowest", lambda: policy.victims(view, count))
    assert one.dtype == torch.int64
    assert torch.equal(where(view, one), where(view, other))
    assert all(len(set(row)) == count for row in one.flatten(0, 1).tolist())


@EXAMPLES
@given(**VIEWS, protect=st.sampled_from([None, 0.5]), count=st.integers(1, 3))
def test_ranks_are_followed(operators, seed, empty, spare, held, protect, count):
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held))
    chance = torch.Generator().manual_seed(seed)
    shape = view.positions.shape
    protected = None if protect is None else torch.rand(shape, generator=chance) < protect
    one, other = both(
        operators, "lowest", lambda: ranking.first(view.positions, protected, view, count)
    )
    assert torch.equal(where(view, one), where(view, other))


@EXAMPLES
@given(**VIEWS, place=st.integers(0, 96), protect=st.booleans())
def test_nan_is_refused_alike(operators, seed, empty, spare, held, place, protect):
    """Wherever it counts: not in the prefix, and not where nothing is."""
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held))
    score = torch.rand(view.positions.shape)
    score[1, 2, place % held] = math.nan
    policy = Given()
    Given.tables = score, torch.ones_like(score, dtype=torch.bool) if protect else None

    def refused():
        try:
            policy.victims(view, 1)
        except kvpolicy.AttentionError as error:
            return str(error)
        return None

    one, other = both(operators, "lowest", refused)
    assert one == other
    position = int(view.positions[1, 2, place % held])
    assert (one is None) == (position < LAYOUT.prefix)


@EXAMPLES
@given(
    **VIEWS,
    kernel=st.sampled_from([1, 3, 5, 9]),
    window=st.sampled_from([0, 1, 40]),
    how=st.sampled_from(["mean", "max"]),
)
def test_neighbours_are_pooled(operators, seed, empty, spare, held, kernel, window, how):
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held))
    one, other = both(operators, "pool", lambda: pool(view, view.mass, kernel, window, how))
    assert torch.equal(one[~view.empty], other[~view.empty])


@EXAMPLES
@given(
    **VIEWS,
    alike=st.sampled_from([0.0, 0.5, 1.0]),
    similar=st.sampled_from([-1.0, -0.3, 0.0, 0.3, 0.5, 0.9]),
    dim=st.sampled_from([1, 8, 40, 64]),
    dtype=st.sampled_from(DTYPES),
)
def test_cosines_are_added(operators, seed, empty, spare, held, alike, similar, dim, dtype):
    """A cosine that is ``similar`` but for its last digits is no matter of either."""
    view = drawn_view(
        seed, empty=empty, spare=spare, size=(2, 3, held), alike=alike, dim=dim, dtype=dtype
    )
    out = view.empty | view.pinned
    keys = view.keys.double()
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosine = unit @ unit.transpose(2, 3)
    assume((cosine - similar).abs().min() > 1e-6)
    part = NotRedundant(similar=similar)
    one, other = both(operators, "cosines", lambda: part._cosines(view, out))
    torch.testing.assert_close(one[~out], other[~out], rtol=1e-5, atol=2e-5)


@EXAMPLES
@given(
    **VIEWS,
    kernel=st.sampled_from([1, 3, 7]),
    window=st.sampled_from([0, 1, 40]),
    importance=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_mass_and_cosines_are_weighed(
    operators, seed, empty, spare, held, kernel, window, importance
):
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held))
    part = NotRedundant(kernel=kernel, window=window, importance=importance)
    cosines = part._cosines(view, part._out(view))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NotRedundant, "_cosines", lambda self, view, out: cosines)
        # Without the kernel for the whole, pooling has one of its own, which is as exact.
        one, other = both(operators, "not_redundant", lambda: part.worth(view))
    out = view.empty | view.pinned
    torch.testing.assert_close(one[~out], other[~out])


def test_equal_keys_are_equally_redundant(operators):
    """To the last bit, wherever they lie, or the older of them would not go."""
    view = drawn_view(3, size=(1, 1, 97), dim=64)
    view._store.keys[:] = view.keys[:, :, 40:41]
    view._store.keys[:, :, 5] *= -1
    part = NotRedundant(similar=0.5)
    one, _ = both(operators, "cosines", lambda: part._cosines(view, view.pinned))
    alike = one[0, 0, [slot for slot in range(2, 97) if slot != 5]]
    assert len(set(alike.tolist())) <= 3  # but for the newest, whom others leave out


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_keys_that_are_not_finite_are_refused(operators, bad):
    view = drawn_view(3, size=(1, 1, 20))
    view._store.keys[0, 0, 7, 1] = bad
    part = NotRedundant()
    both_of = both(operators, "cosines", lambda: part._cosines(view, view.pinned))
    for each in both_of:
        assert each[0, 0, 2:].isnan().any()


def test_keys_too_long_for_their_length_are_like_none(operators):
    view = drawn_view(3, size=(1, 1, 20))
    view._store.keys[0, 0, 7] = 1e30
    part = NotRedundant()
    one, other = both(operators, "cosines", lambda: part._cosines(view, view.pinned))
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
    view = drawn_view(
        seed, empty=empty, spare=spare, size=(2, 3, held), alike=alike, dim=dim, dtype=dtype
    )
    if dtype is torch.float32:
        view._store.values.mul_(scale)
    part = LeastChange(lines=lines)
    one, other = both(operators, "change_alone", lambda: part.worth(view))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    nothing = (moved(view, lines) == 0).all(2)
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
    view = drawn_view(
        seed, empty=empty, spare=spare, size=(2, 3, held), alike=alike, dim=dim, dtype=dtype
    )
    part = LeastChange(lines=lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "operators", lambda: None)
        score = ranking.lift(part.worth(view), None)
    score.masked_fill_(view.pinned, INF).masked_fill_(view.empty, -INF)
    count = data.draw(st.integers(1, held - LAYOUT.prefix))
    one, other = both(operators, "change_together", lambda: part.choose(view, score, count))
    assert all(len(set(row)) == count for row in one.flatten(0, 1).tolist())
    mass, values, read = part._foreseen(view)
    changes = least_change._changes(mass.double(), values.double(), read.double())
    start = score.double()
    for head in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        at = tuple(head)
        cost = start[at].clone()
        for mine, theirs in zip(one[at].tolist(), other[at].tolist(), strict=True):
            if view.positions[at][mine] != view.positions[at][theirs]:
                torch.testing.assert_close(cost[mine], cost[theirs], rtol=1e-4, atol=1e-5)
                break
            cost += 2 * changes[at][mine]
            cost[mine] = INF


@EXAMPLES
@given(
    **VIEWS,
    window=st.integers(1, 200),
    local=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    few=st.booleans(),
)
def test_heads_are_of_the_same_kind(operators, seed, empty, spare, held, window, local, few):
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held))
    if few:  # all mass on one token
        view.mass.mul_(view.positions == view.positions.amax(-1, keepdim=True))
    part = ByHead(window=window, local=local)
    one, other = both(operators, "by_head", lambda: part.worth(view))
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
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held), dim=dim, dtype=dtype)
    chance = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, held, (2, 3, forgotten), generator=chance)

    def found(before):
        known = KeyLengths(view._store.shape)
        known.mass[:, :, :held] = before
        known.read = held
        known.forget(slots)
        return known.of(view).clone()

    one, other = both(operators, "key_lengths", lambda: found(lengths(view.keys)))
    torch.testing.assert_close(one, other)
    one, _ = both(operators, "key_lengths", lambda: found(math.nan))
    forgot = torch.zeros_like(one, dtype=torch.bool).scatter(2, slots, True)
    torch.testing.assert_close(one[forgot], other[forgot])
    assert one[~forgot].isnan().all()


@EXAMPLES
@given(**VIEWS, lot=st.integers(0, 2**31 - 1))
def test_the_same_lots_are_drawn(operators, seed, empty, spare, held, lot):
    view = drawn_view(seed, empty=empty, spare=spare, size=(2, 3, held))
    one, other = both(operators, "lots", lambda: Lots(seed=lot).worth(view))
    assert torch.equal(one, other)


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "policy",
    [
        kvpolicy.create(name, **({"anchors": 3} if name in ("linear", "linear2d") else {}))
        for name in kvpolicy.available()
        if name not in ("compose", "full")
    ],
    ids=lambda policy: policy.key,
)
def test_every_policy_decides_as_without_them(operators, policy, dtype, reclaim):
    """A whole stream; attention is torch's in both, so that readings are the same bit for bit."""

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
        patch.setattr(native, "decoder", lambda: None)
        patch.setattr(native, "operators", lambda: counted)
        one = held()
        patch.setattr(native, "operators", lambda: None)
        other = held()
    assert counted.used
    assert all(map(torch.equal, one, other))


def test_they_are_not_used_where_they_do_not_serve(operators):
    counted = Counted(operators)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "operators", lambda: counted)
        view = drawn_view(1)
        for score in (torch.rand(2, 3, 30, requires_grad=True), torch.rand(2, 3, 30).double()):
            assert ranking.in_one_pass(score, None, view, 1) is None
        odd = torch.ones(2, 3, 30, dtype=torch.int32)
        assert ranking.in_one_pass(torch.rand(2, 3, 30), odd, view, 1) is None
        assert ranking.in_one_pass(torch.rand(2, 1, 30), None, view, 1) is None
        double = drawn_view(1, dtype=torch.float64)
        assert native.chooser("cosines", double.keys, double.positions) is None
