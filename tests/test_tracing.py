"""A trace says what was cached at any moment, and why."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import ParameterError
from kvpolicy.traces import STAYS

safetensors = pytest.importorskip("safetensors.torch", reason="traces are safetensors files")

RASTER = kvpolicy.RasterLayout(rows=6, cols=4, prefix=2)
SMALL = {
    "linear": {"anchors": 2},
    "linear2d": {"anchors": 2},
    "pyramid": {"window": 2, "interval": 3, "kernel": 1},
    "snapkv": {"window": 2, "interval": 3, "kernel": 1},
    "rkv": {"window": 2, "interval": 3, "kernel": 1},
}
EVICTING = [name for name in kvpolicy.available() if name not in ("full", "compose")]


def make(name):
    return kvpolicy.create(name, **SMALL.get(name, {}))


def feed(cache, sizes, seed=0, visible=None):
    """Tokens in calls of these sizes; yields after each."""
    generator = torch.Generator().manual_seed(seed)
    seen = cache.seen
    for size in sizes:
        for layer in range(len(cache.layers)):
            q = torch.randn(2, 4, size, 8, generator=generator) * 3
            k, v = torch.randn(2, 2, 2, size, 8, generator=generator)
            rows = None if visible is None else visible[:, :, seen : seen + size, : seen + size]
            cache.attend(layer, q, k, v, visible=rows)
        seen += size
        yield seen


def holds(found, layer, seen):
    """Held positions by the trace, as sets."""
    held = found.layers[layer].held(seen)
    return [[set(head.nonzero().flatten().tolist()) for head in sample] for sample in held]


def truth(cache, layer):
    return [[set(head[head >= 0].tolist()) for head in sample] for sample in cache.positions(layer)]


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize("name", EVICTING)
@given(data=st.data())
def test_the_trace_equals_the_cache_at_every_moment(name, reclaim, data):
    text = data.draw(st.booleans(), label="text")
    layout = kvpolicy.TextLayout(sinks=1, line_length=3) if text else RASTER
    length, sizes = 26, []
    while sum(sizes) < length:
        sizes.append(data.draw(st.integers(1, min(length - sum(sizes), 15)), label="size"))
    visible = None
    if text and data.draw(st.booleans(), label="padded"):
        visible = torch.ones(length, length).tril().bool().expand(2, 1, -1, -1).clone()
        visible[1, :, :, : data.draw(st.integers(1, 4))] = False
    windows = [9, None] if text and data.draw(st.booleans(), label="windows") else None
    budget = data.draw(st.sampled_from([8, 10])) if name == "ssd" else 8
    budget = max(budget, make(name).min_budget(layout))
    cache = kvpolicy.PolicyCache(
        make(name), budget, layout=layout, num_layers=2, reclaim=reclaim, windows=windows
    )
    if cache.stats().left_alone:
        return
    with kvpolicy.trace(cache) as recording:
        moments = []
        for seen in feed(cache, sizes, data.draw(st.integers(0, 99)), visible):
            moments.append((seen, [truth(cache, layer) for layer in range(2)]))
            if data.draw(st.booleans(), label="look in between"):
                recording.finish()
    found = recording.finish()
    assert found.seen == length
    for seen, held in moments:
        for layer in range(2):
            assert holds(found, layer, seen) == held[layer], (seen, layer)


@pytest.mark.parametrize("name", EVICTING)
def test_it_survives_the_file(name, tmp_path):
    cache = kvpolicy.PolicyCache(make(name), 12, layout=RASTER, num_layers=2)
    with kvpolicy.trace(cache) as recording:
        list(feed(cache, [5] + [1] * 21))
    images = torch.randint(0, 255, (2, 6, 4), dtype=torch.uint8)
    first = recording.finish(images)
    first.save(tmp_path / "a.safetensors")
    second = kvpolicy.load_trace(tmp_path / "a.safetensors")
    assert second.grid == {"rows": 6, "cols": 4, "line_break": 0, "prefix": 2}
    assert (second.policy, second.parameters) == (first.policy, first.parameters)
    assert kvpolicy.create(second.policy, **second.parameters) == cache.policy
    assert torch.equal(second.images, images)
    for index, layer in first.layers.items():
        for field, tensor in vars(layer).items():
            other = getattr(second.layers[index], field)
            assert torch.equal(other, tensor), field
            assert other.dtype == tensor.dtype


def test_the_scores_are_those_that_decided():
    cache = kvpolicy.PolicyCache(make("linear"), 12, layout=RASTER, num_layers=1)
    with kvpolicy.trace(cache) as recording:
        list(feed(cache, [1] * 26))
    layer = recording.finish().layers[0]
    begun = vict = 0
    for count, candidates in zip(layer.counts.tolist(), layer.candidates.tolist(), strict=True):
        places = layer.places[..., begun : begun + candidates]
        scores = layer.scores[..., begun : begun + candidates]
        victims = layer.victims[..., vict : vict + count]
        begun, vict = begun + candidates, vict + count
        for sample, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
            by_place = dict(
                zip(places[sample, head].tolist(), scores[sample, head].tolist(), strict=True)
            )
            chosen = [by_place[p] for p in victims[sample, head].tolist()]
            assert chosen == sorted(chosen), "worst first"
    assert layer.decided.tolist() == [14, 18, 22]
    assert layer.counts.tolist() == [4, 4, 4]


def test_some_samples_only():
    whole = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    part = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    with kvpolicy.trace(whole) as all_of_it, kvpolicy.trace(part, samples=[1]) as one:
        list(feed(whole, [1] * 26))
        list(feed(part, [1] * 26))
    assert torch.equal(one.finish().layers[0].gone, all_of_it.finish().layers[0].gone[1:])
    with kvpolicy.trace(cache := kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1),
                        samples=[1]):  # fmt: skip
        list(feed(cache, [4]))
        with pytest.raises(kvpolicy.CacheStateError, match="trace them all"):
            cache.select_batch(torch.tensor([1, 0]))


def test_it_follows_a_reordered_batch_and_begins_anew_after_a_reset():
    cache = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    with kvpolicy.trace(cache) as recording:
        list(feed(cache, [1] * 20))
        cache.select_batch(torch.tensor([1, 1]))
        list(feed(cache, [1] * 6, seed=1))
        assert holds(recording.finish(), 0, 26) == truth(cache, 0)
        cache.reset()
        list(feed(cache, [1] * 14))
        found = recording.finish()
    assert found.seen == 14
    assert holds(found, 0, 14) == truth(cache, 0)


def test_nothing_is_recorded_after_the_block():
    cache = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    with kvpolicy.trace(cache):
        assert cache.layers[0].recorder is not None
        with pytest.raises(kvpolicy.CacheStateError, match="already"):
            kvpolicy.trace(cache).__enter__()
    assert cache.layers[0].recorder is None
    list(feed(cache, [3]))
    with (
        pytest.raises(kvpolicy.CacheStateError, match=r"seen 3 tokens already.*reset"),
        kvpolicy.trace(cache),
    ):
        pass


def test_without_scores_it_is_small():
    def size(**options):
        cache = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
        with kvpolicy.trace(cache, **options) as recording:
            list(feed(cache, [1] * 26))
        return len(recording.finish().dump())

    assert size(scores=False) < size() / 2


# -- damaged and hostile files ---------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    cache = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    with kvpolicy.trace(cache) as recording:
        list(feed(cache, [1] * 26))
    path = tmp_path / "x.safetensors"
    recording.save(path)
    return path


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ParameterError, match=r"x\.safetensors can't be read as a trace"):
        kvpolicy.load_trace(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(ParameterError, match=r"no\.safetensors can't be read as a trace"):
        kvpolicy.load_trace(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda about, tensors: about.clear(),
        lambda about, tensors: about.update(format="kvpolicy-trace-99"),
        lambda about, tensors: about.update(seen="many"),
        lambda about, tensors: about.update(layers=[0, 1]),
        lambda about, tensors: about.update(seen=5),
        lambda about, tensors: about.update(grid=[1, 2]),
        lambda about, tensors: tensors.pop("0.gone"),
        lambda about, tensors: tensors.update({"0.counts": tensors["0.counts"][1:]}),
        lambda about, tensors: tensors.update({"0.victims": tensors["0.victims"][:, :1]}),
        lambda about, tensors: tensors.update({"0.scores": tensors["0.scores"][..., 1:]}),
    ],
)
def test_a_file_that_is_no_trace(file, change):
    with safetensors.safe_open(str(file), framework="pt") as opened:
        about = json.loads(opened.metadata()["kvpolicy"])
    tensors = safetensors.load_file(file)
    change(about, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.save_file(tensors, file, metadata={"kvpolicy": json.dumps(about)})
    with pytest.raises(ParameterError, match=r"x\.safetensors"):
        kvpolicy.load_trace(file)


def test_another_safetensors_file(tmp_path):
    safetensors.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ParameterError, match="not a trace that kvpolicy wrote"):
        kvpolicy.load_trace(tmp_path / "a.safetensors")


def test_images_must_be_those_of_the_samples():
    cache = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    with kvpolicy.trace(cache) as recording:
        list(feed(cache, [3]))
    with pytest.raises(ParameterError, match=r"expected \[2, rows, columns\]"):
        recording.finish(torch.zeros(3, 6, 4, dtype=torch.uint8))
    assert (recording.finish().layers[0].gone == STAYS).all()
