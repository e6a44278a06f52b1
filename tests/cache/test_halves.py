"""halves="first": the second half of a batch gives up what the first does, as under guidance."""

import pytest
import torch

import kvpolicy
from kvpolicy import CacheStateError, ParameterError, PolicyCache, RasterLayout

LAYOUT = RasterLayout(rows=6, cols=4, prefix=2)
SMALL = {
    "linear": {"anchors": 2},
    "linear2d": {"anchors": 2, "parts": 2},
    "h2o": {},
    "rkv": {"window": 2, "interval": 3},
    "random": {},
}


def drive(name, tokens, *, halves, reclaim="lazy", count=LAYOUT.length):
    policy = kvpolicy.create(name, **SMALL[name])
    cache = PolicyCache(policy, 13, layout=LAYOUT, num_layers=2, reclaim=reclaim, halves=halves)
    outputs = []
    for token in range(count):
        for layer in range(2):
            query, key, value = (each[..., token : token + 1, :] for each in tokens[layer])
            outputs.append(cache.attend(layer, query, key, value))
    return cache, torch.stack(outputs)


def drawn(batch, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, 2, 26, 8, generator=draw) for _ in range(3)] for _ in range(2)]


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize("name", SMALL)
def test_both_halves_hold_what_the_first_would_alone(name, reclaim):
    tokens = drawn(4)
    first = [[each[:2] for each in layer] for layer in tokens]
    alone, said_alone = drive(name, first, halves="own", reclaim=reclaim)
    both, said = drive(name, tokens, halves="first", reclaim=reclaim)
    own, _ = drive(name, tokens, halves="own", reclaim=reclaim)
    torch.testing.assert_close(said[:, :2], said_alone)
    differ = 0
    for layer in range(2):
        held = both.positions(layer)
        assert torch.equal(held[:2], alone.positions(layer))
        assert torch.equal(held[2:], held[:2])
        differ += not torch.equal(own.positions(layer), held)
    # random draws lots by position, the same for every sequence.
    assert differ or name == "random"


def test_an_odd_batch_is_refused():
    with pytest.raises(CacheStateError, match="as many sequences in the second half"):
        drive("linear", drawn(3), halves="first")


def test_halves_that_hold_different_tokens_are_refused():
    """One of the second half is padded where the first has a token."""
    tokens = drawn(2)[0]
    cache = PolicyCache(
        "h2o", 8, layout=kvpolicy.TextLayout(length=26), num_layers=1, halves="first"
    )

    def attend(start, end):
        seen = torch.ones(2, 1, end, end, dtype=torch.bool).tril()[:, :, start:]
        seen[1, :, :, 0] = False
        cache.attend(0, *(each[..., start:end, :] for each in tokens), visible=seen)

    attend(0, 4)
    with pytest.raises(CacheStateError, match="hold other tokens than each other"):
        for token in range(4, 26):
            attend(token, token + 1)


def test_no_other_word_is_taken():
    with pytest.raises(ParameterError, match="halves='second' must be 'own' or 'first'"):
        PolicyCache("linear", 13, layout=LAYOUT, num_layers=1, halves="second")


def test_a_state_goes_into_a_cache_of_the_same_kind_alone():
    cache, _ = drive("linear", drawn(2), halves="first", count=20)
    own, _ = drive("linear", drawn(2), halves="own", count=20)
    state = cache.state_dict()
    with pytest.raises(CacheStateError, match="halves='first', but this cache has halves='own'"):
        own.load_state_dict(state)
    again, _ = drive("linear", drawn(2), halves="first", count=1)
    again.load_state_dict(state)
    assert torch.equal(again.positions(0), cache.positions(0))
    older = own.state_dict()
    del older["halves"]
    own.load_state_dict(older)
