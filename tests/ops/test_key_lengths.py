"""Lengths of keys that are found once are those of the keys that lie there now."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.ops import key_lengths
from kvpolicy.ops.key_lengths import lengths
from kvpolicy.parts import KeyLengths
from kvpolicy.policies import KNorm, knorm
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape, SlotStore


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    decide=st.sampled_from(["token", "every:3", "every:16", "line"]),
    calls=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    reclaim=st.sampled_from(["lazy", "eager"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    text=st.booleans(),
    shuffle=st.booleans(),
)
def test_they_are_what_they_would_be(seed, decide, calls, reclaim, dtype, text, shuffle):
    compared = []
    plain = knorm.key_lengths

    def watched(view):
        found = plain(view)
        assert view.find_observer(KeyLengths) is not None
        assert torch.equal(found[~view.empty], lengths(view.keys)[~view.empty])
        compared.append(view.seen)
        return found

    layout = (
        kvpolicy.TextLayout(sinks=2, line_length=5)
        if text
        else kvpolicy.RasterLayout(rows=90, cols=5, prefix=2)
    )
    cache = kvpolicy.PolicyCache(
        kvpolicy.create(f"knorm/decide={decide}"),
        24,
        layout=layout,
        num_layers=1,
        reclaim=reclaim,
    )
    chance = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knorm, "key_lengths", watched)
        for tokens in [*calls, *[1] * 30, *calls]:
            key = torch.randn(3, 2, tokens, 8, generator=chance).to(dtype)
            cache.attend(0, key, key, key)
            if shuffle:
                cache.select_batch(torch.randint(0, 3, (3,), generator=chance))
    assert compared


def test_few_keys_are_read_at_a_decision(monkeypatch):
    """The new one, once all slots are taken."""
    read = []
    monkeypatch.setattr(
        key_lengths, "lengths", lambda keys: read.append(keys.shape[2]) or lengths(keys)
    )
    cache = kvpolicy.PolicyCache("knorm", 16, layout=kvpolicy.TextLayout(), num_layers=1)
    for _ in range(30):
        key = torch.randn(1, 2, 1, 8)
        cache.attend(0, key, key, key)
    assert read == [16] + [1] * 13


def test_a_prefix_that_is_not_a_number_hides_no_new_key():
    """NaN is pinned, so nobody is refused; which slots are not known is still found."""
    view_shape = SlotShape(1, 1, 8, torch.device("cpu"), kvpolicy.TextLayout(sinks=1))
    keys = torch.randn(1, 1, 8, 4)
    keys[0, 0, 0] = float("nan")
    store = SlotStore.holding(view_shape, keys, keys)
    known = KeyLengths(view_shape)
    view = CacheView(
        store, [known], seen=8, room=0, layer=0, num_layers=1, budget=7, layout=view_shape.layout
    )
    known.of(view)
    keys[0, 0, 5] *= 3
    known.forget(torch.tensor([[[5]]]))
    assert torch.equal(known.of(view).nan_to_num(), lengths(keys).nan_to_num())


def test_without_the_observer_all_are_read():
    class Blind(KNorm):
        def observers(self, shape):
            return ()

    def held(policy):
        cache = kvpolicy.PolicyCache(policy, 16, layout=kvpolicy.TextLayout(), num_layers=1)
        chance = torch.Generator().manual_seed(1)
        for _ in range(40):
            key = torch.randn(2, 2, 1, 8, generator=chance)
            cache.attend(0, key, key, key)
        return cache.positions(0)

    assert torch.equal(held(Blind()), held("knorm"))
