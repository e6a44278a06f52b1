"""Copies: deep ones, saved ones, and one prefix for many continuations."""

from __future__ import annotations

import copy

import pytest
import torch
from support import tiny_models

import kvpolicy

GRID = kvpolicy.RasterLayout(rows=5, cols=4)
LAYOUTS = {
    "image": kvpolicy.RasterLayout(rows=5, cols=4, prefix=3),
    "text": kvpolicy.TextLayout(sinks=1, length=40),
    "late": kvpolicy.AfterPrompt(GRID),
}
NAMES = ["linear", "h2o", "snapkv", "knorm", "streaming_llm", "random"]
SMALL = {"linear": {"anchors": 2}, "snapkv": {"window": 2, "interval": 3, "kernel": 3}}


def make(name="h2o", layout="late", **options) -> kvpolicy.PolicyCache:
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    return kvpolicy.PolicyCache(policy, 12, layout=LAYOUTS[layout], num_layers=2, **options)


def feed(cache, sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for size in sizes:
        for layer in range(2):
            query = torch.randn(2, 4, size, 8, generator=generator)
            key, value = torch.randn(2, 2, 2, size, 8, generator=generator)
            outputs.append(cache.attend(layer, query, key, value))
    return outputs


def same(cache, other) -> bool:
    return all(torch.equal(cache.positions(n), other.positions(n)) for n in range(2)) and (
        cache.stats() == other.stats()
    )


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_as_the_original(name, layout, reclaim, tmp_path):
    for before in ([], [3], [3, 1, 1], [3, *[1] * 15]):
        cache = make(name, layout, reclaim=reclaim)
        feed(cache, before)
        copied = copy.deepcopy(cache)
        torch.save(cache.state_dict(), tmp_path / "cache.pt")
        loaded = make(name, layout, reclaim=reclaim)
        loaded.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
        rest = [3, *[1] * 18][len(before) :]
        expected = feed(cache, rest, 1)
        for other in (copied, loaded):
            assert all(map(torch.equal, feed(other, rest, 1), expected))
            assert same(other, cache)


def test_one_prefix_for_many_continuations():
    """What the page on speed and the README promise: prefill once, copy, go on."""
    cache = make("h2o", "image")
    feed(cache, [3, *[1] * 8])
    ends = []
    for seed in (1, 2):
        here = copy.deepcopy(cache)
        feed(here, [1] * 9, seed)
        alone = make("h2o", "image")
        feed(alone, [3, *[1] * 8])
        feed(alone, [1] * 9, seed)
        assert same(here, alone)
        ends.append(here.positions(0))
    assert cache.seen == 11
    assert not torch.equal(*ends)


def test_a_copy_shares_no_memory():
    cache = make("linear", "image")
    feed(cache, [3, *[1] * 10])
    before = [layer.store.keys.clone() for layer in cache.layers]
    feed(copy.deepcopy(cache), [1] * 9)
    loaded = make("linear", "image")
    loaded.load_state_dict(cache.state_dict())
    feed(loaded, [1] * 9)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.store.keys, keys)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: make("snapkv", "image"), "saved with policy="),
        (lambda: make("h2o", "image", reclaim="eager"), "reclaim='lazy', but this cache has"),
        (lambda: make("h2o", "text"), "on .*RasterLayout.*make the cache alike"),
        (
            lambda: kvpolicy.PolicyCache("h2o", 13, layout=LAYOUTS["image"], num_layers=2),
            "budget of 13 tokens",
        ),
        (
            lambda: kvpolicy.PolicyCache("h2o", 12, layout=LAYOUTS["image"], num_layers=3),
            "num_layers=2, but this cache has num_layers=3",
        ),
    ],
)
def test_a_state_of_another_cache_is_refused(other, words):
    cache = make("h2o", "image")
    feed(cache, [3, *[1] * 10])
    with pytest.raises(kvpolicy.CacheStateError, match=words):
        other().load_state_dict(cache.state_dict())


def test_what_can_not_be_written_down_is_named():
    class Diary(kvpolicy.CumulativeMass):
        def __init__(self, shape):
            super().__init__(shape)
            self.pages = []

    class Writes(type(kvpolicy.create("h2o"))):
        def observers(self, shape):
            return (Diary(shape),)

    cache = kvpolicy.PolicyCache(Writes(), 12, layout=LAYOUTS["image"], num_layers=2)
    feed(cache, [3])
    with pytest.raises(kvpolicy.ParameterError, match=r"Diary\.pages is a list"):
        cache.state_dict()
    copy.deepcopy(cache)


@pytest.mark.parametrize("name", ["h2o", "linear"])
def test_a_prompt_is_cached_once_and_copied_for_each_continuation(name):
    """A copy of the cache that attach gives goes on alone, and ends with the block."""
    pytest.importorskip("transformers", reason="the adapters need transformers")
    import kvpolicy_adapters

    model = tiny_models.llama()
    layout = kvpolicy.RasterLayout(rows=5, cols=4, prefix=5)
    policy = tiny_models.policy(name)
    prompt = torch.arange(1, 6)[None]
    with (
        torch.inference_mode(),
        kvpolicy_adapters.attach(model, policy=policy, budget=13, layout=layout) as cache,
    ):
        model(prompt, **cache.as_argument)
        copies = [copy.deepcopy(cache) for _ in range(2)]
        drawn = []
        for token, own in zip((7, 9), copies, strict=True):
            ids = torch.cat([prompt, torch.tensor([[token]])], dim=1)
            drawn.append(model.generate(ids, max_new_tokens=12, do_sample=False, **own.as_argument))
            assert own.get_seq_length() == 17
        assert cache.get_seq_length() == 5
    for token, tokens in zip((7, 9), drawn, strict=True):
        ids = torch.cat([prompt, torch.tensor([[token]])], dim=1)
        with kvpolicy_adapters.attach(model, policy=policy, budget=13, layout=layout) as alone:
            expected = model.generate(ids, max_new_tokens=12, do_sample=False, **alone.as_argument)
        assert torch.equal(tokens, expected)
    with pytest.raises(kvpolicy.CacheStateError, match="block has ended"):
        model(prompt, **copies[0].as_argument)
