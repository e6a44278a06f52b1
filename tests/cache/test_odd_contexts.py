"""Contexts that a user may decode in: each works, or is refused by name at the first token."""

from __future__ import annotations

import pytest
import torch
from support.turns import in_turn

import kvpolicy

LAYOUT = kvpolicy.RasterLayout(rows=5, cols=4, prefix=2)
NAMES = [name for name in kvpolicy.available() if name != "compose"]
SMALL = {
    "linear": {"anchors": 2},
    "linear2d": {"anchors": 2},
    "snapkv": {"window": 2, "interval": 3, "kernel": 3},
    "pyramid": {"window": 2, "interval": 3, "kernel": 3},
    "rkv": {"window": 2, "interval": 3, "kernel": 3},
}


def make(name: str, layout=LAYOUT) -> kvpolicy.PolicyCache:
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    budget = None if name == "full" else max(policy.min_budget(layout), 8)
    return kvpolicy.PolicyCache(policy, budget, layout=layout, num_layers=1)


def tokens(dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 22, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 22, 8, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def feed(cache, stream, sizes) -> torch.Tensor:
    first, outputs = cache.seen, []
    for size in sizes:
        outputs.append(cache.attend(0, *(t[:, :, first : first + size] for t in stream)))
        first += size
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize(
    ("name", "prompt", "reorder"), in_turn(NAMES, [1, 5, 13], turn=[False, True])
)
def test_a_prefill_in_inference_mode_and_decoding_outside(name, prompt, reorder):
    stream, expected, cache = tokens(), make(name), make(name)
    index = torch.tensor([1, 0])
    with torch.inference_mode():
        feed(cache, tokens(), [prompt])
        if reorder:
            cache.select_batch(index)
    feed(expected, stream, [prompt])
    if reorder:
        expected.select_batch(index)
    with torch.no_grad():
        output = feed(cache, stream, [1] * (22 - prompt))
    assert torch.equal(output, feed(expected, stream, [1] * (22 - prompt)))
    with torch.inference_mode():  # and the other way round
        cache.reset()
    feed(cache, stream, [prompt])
    with torch.inference_mode():
        feed(cache, tokens(), [1] * (22 - prompt))
    if not reorder:
        assert torch.equal(cache.positions(0), expected.positions(0))


@pytest.mark.parametrize("sizes", [[22], [1] * 22, [9, 1, 12]])
def test_autocast_is_what_the_dtype_would_give(sizes):
    """Rotation gives float32 keys, projections give bfloat16 values: one cache holds both."""
    query, key, value = tokens()
    expected = feed(make("h2o"), tokens(torch.bfloat16), sizes)
    cache = make("h2o")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = feed(cache, (query, key, value.bfloat16()), sizes)
    assert cache.layers[0].store.keys.dtype == output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_gradients_go_through_one_call():
    query, key, value = (t.requires_grad_() for t in tokens())
    cache = make("full")
    cache.attend(0, query, key, value).square().sum().backward()
    mine = [t.grad.clone() for t in (query, key, value)]
    for t in (query, key, value):
        t.grad = None
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    theirs.square().sum().backward()
    for a, b in zip(mine, (query, key, value), strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[1, 1], [5, 1], [5, 3]])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_through_several_calls_are_refused_at_the_second(sizes, which):
    stream = tokens()
    stream[which].requires_grad_()
    cache = make("h2o")
    with pytest.raises(kvpolicy.CacheStateError, match=r"gradients can't.*no_grad\(\)"):
        feed(cache, stream, sizes)
    assert cache.seen == sizes[0]
    with torch.no_grad():
        feed(cache, stream, [sizes[1]])
    assert not cache.layers[0].store.keys.requires_grad


def test_positions_end_where_ranking_does():
    cache = make("h2o", kvpolicy.TextLayout(sinks=1))
    feed(cache, tokens(), [3])
    cache.layers[0].seen = 2**30 - 2
    with pytest.raises(
        kvpolicy.LayoutError, match=r"position 1073741824 is outside what positions can"
    ):
        cache.attend(0, *(t[:, :, :3] for t in tokens()))
