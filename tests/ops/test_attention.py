"""attend(): every term that models add to attention, against a plain float64 reading of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.ops.attend import by_slot

HEADS, SLOTS, DIM = 2, 7, 8


def plain(query, keys, values, *, scale, visible, bias, softcap, sinks):
    """Output and mass, one query head and one query at a time."""
    batch, query_heads, count, _ = query.shape
    group = query_heads // keys.shape[1]
    output = torch.zeros(batch, query_heads, count, values.shape[-1], dtype=torch.float64)
    mass = torch.zeros(batch, keys.shape[1], count, keys.shape[2], dtype=torch.float64)
    for b in range(batch):
        for q in range(query_heads):
            head = q // group
            for t in range(count):
                scores = keys[b, head].double() @ query[b, q, t].double() * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                if bias is not None:
                    by_head = bias.shape[1] // query_heads * q if bias.shape[1] > 1 else 0
                    by_head = q if bias.shape[1] == query_heads else by_head
                    by_head = head if bias.shape[1] == keys.shape[1] else by_head
                    scores = scores + bias[b % bias.shape[0], by_head, t].double()
                seen = torch.ones(len(scores), dtype=torch.bool)
                if visible is not None:
                    seen = visible[b % visible.shape[0], head % visible.shape[1], t]
                weights = torch.where(seen, scores.exp(), 0.0)
                extra = 0.0 if sinks is None else math.exp(sinks[q])
                weights = weights / (weights.sum() + extra)
                output[b, q, t] = weights @ values[b, head].double()
                mass[b, head, t] += weights / group
    return output, mass


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_term_against_float64(data):
    batch, group = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3]))
    count = data.draw(st.sampled_from([1, 4]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def draw(*size):
        return torch.randn(*size, generator=generator)

    query = draw(batch, HEADS * group, count, DIM) * 3
    keys, values = draw(batch, HEADS, SLOTS, DIM), draw(batch, HEADS, SLOTS, DIM // 2)
    visible = bias = softcap = sinks = None
    if data.draw(st.booleans(), label="masked"):
        visible = draw(batch, data.draw(st.sampled_from([1, HEADS])), count, SLOTS) > 0
        visible[..., 0] = True
    if data.draw(st.booleans(), label="biased"):
        heads = data.draw(st.sampled_from([1, HEADS, HEADS * group]))
        bias = draw(data.draw(st.sampled_from([1, batch])), heads, count, SLOTS)
    if data.draw(st.booleans(), label="capped"):
        softcap = 2.0
    if data.draw(st.booleans(), label="with sinks"):
        sinks = draw(HEADS * group)
    terms = {"visible": visible, "bias": bias, "softcap": softcap, "sinks": sinks}
    expected, expected_mass = plain(query, keys, values, scale=0.4, **terms)
    for need_mass in (True, False):
        output, mass = kvpolicy.attend(query, keys, values, scale=0.4, need_mass=need_mass, **terms)
        torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
        assert (mass is None) is not need_mass
    _, mass = kvpolicy.attend(query, keys, values, scale=0.4, need_mass=True, **terms)
    torch.testing.assert_close(mass.double(), expected_mass, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("need_mass", [True, False])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_query_that_sees_nothing_gives_no_nan_and_no_mass(need_mass, sinks, count):
    query = torch.randn(1, 4, count, DIM)
    keys, values = torch.randn(2, 1, HEADS, SLOTS, DIM)
    hidden = torch.zeros(1, 1, count, SLOTS, dtype=torch.bool)
    output, mass = kvpolicy.attend(
        query, keys, values, visible=hidden, sinks=sinks, need_mass=need_mass
    )
    assert output.isfinite().all()
    assert mass is None or not mass.any()


def test_terms_by_slot():
    positions = torch.tensor([[[2, -1, 0], [1, 3, 2]]])
    by_head = torch.arange(2 * 4.0).view(1, 2, 1, 4)
    assert by_slot(by_head, positions).tolist() == [[[[2, 0, 0]], [[5, 7, 6]]]]
    shared = torch.arange(4.0).view(1, 1, 1, 4)
    assert by_slot(shared, positions).tolist() == [[[[2, 0, 0]], [[1, 3, 2]]]]
    by_query_head = torch.arange(4 * 4.0).view(1, 4, 1, 4)
    assert by_slot(by_query_head, positions)[0, :, 0].tolist() == [
        [2, 0, 0],
        [6, 4, 4],
        [9, 11, 10],
        [13, 15, 14],
    ]


# -- the same terms through a cache ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["h2o", "streaming_llm"])
@pytest.mark.parametrize("term", ["bias", "softcap", "sinks"])
def test_chunks_with_a_term_equal_one_by_one_under_eviction(name, term):
    torch.manual_seed(0)
    length, batch, group = 24, 2, 2
    query = torch.randn(batch, HEADS * group, length, DIM) * 2
    key, value = torch.randn(2, batch, HEADS, length, DIM)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, -1, 1, 1)

    def run(sizes):
        # An image's layout: chunks give what single tokens give, from the first one on.
        layout = kvpolicy.RasterLayout(rows=4, cols=6)
        cache = kvpolicy.PolicyCache(name, 8, layout=layout, num_layers=1)
        outputs, seen = [], 0
        for size in sizes:
            part = slice(seen, seen + size)
            seen += size
            terms = {
                "bias": {"bias": -slopes * distance[part, :seen]},
                "softcap": {"softcap": 1.5},
                "sinks": {"sinks": torch.linspace(-1, 1, HEADS * group)},
            }[term]
            outputs.append(
                cache.attend(0, query[:, :, part], key[:, :, part], value[:, :, part], **terms)
            )
        return torch.cat(outputs, dim=2), cache.positions(0).sort(-1).values

    expected, held = run([1] * length)
    for sizes in ([24], [10, 1, 7, 6], [5] * 4 + [4]):
        output, positions = run(sizes)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(positions, held)
    # The term matters: without it, the same tokens give something else.
    bare = kvpolicy.PolicyCache(name, 8, layout=kvpolicy.RasterLayout(rows=4, cols=6), num_layers=1)
    assert not torch.allclose(bare.attend(0, query, key, value), expected, atol=1e-2)


def test_another_layer_attends_to_the_same_tokens():
    """A borrowing layer's queries see what the owner's saw, at every token of every chunk."""
    torch.manual_seed(0)
    length, layout = 24, kvpolicy.RasterLayout(rows=4, cols=6)
    query, other = torch.randn(2, 1, HEADS * 2, length, DIM)
    key, value = torch.randn(2, 1, HEADS, length, DIM)

    def run(sizes):
        cache = kvpolicy.PolicyCache("h2o", 8, layout=layout, num_layers=1, lent={0})
        outputs, seen = [], 0
        for size in sizes:
            part = slice(seen, seen + size)
            seen += size
            cache.attend(0, query[:, :, part], key[:, :, part], value[:, :, part])
            outputs.append(cache.attend_shared(0, other[:, :, part])[0])
        return torch.cat(outputs, dim=2)

    # The owner's own queries, lent to itself, give what it got.
    cache = kvpolicy.PolicyCache("h2o", 8, layout=layout, num_layers=1, lent={0})
    first = cache.attend(0, query, key, value)
    again = cache.attend_shared(0, query)[0]
    torch.testing.assert_close(again, first, atol=1e-6, rtol=1e-6)
    expected = run([1] * length)
    for sizes in ([24], [10, 1, 7, 6]):
        torch.testing.assert_close(run(sizes), expected, atol=1e-5, rtol=1e-5)
    # A model may drop all but the last tokens before it borrows (Gemma 4 does).
    for last in (1, 5, 13):
        some = cache.attend_shared(0, query[:, :, -last:])[0]
        torch.testing.assert_close(some, first[:, :, -last:], atol=1e-6, rtol=1e-6)
    more = torch.cat([query, query], dim=2)
    with pytest.raises(kvpolicy.CacheStateError, match="lends its tokens to 48 queries"):
        cache.attend_shared(0, more)
