"""A trace says what was cached at any moment, and why."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import ParameterError
from kvpolicy.lab.show.report import report_on_trace
from kvpolicy.tracing.trace import STAYS

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
        assert cache.layers[0].decider.recorder is not None
        with pytest.raises(kvpolicy.CacheStateError, match="already"):
            kvpolicy.trace(cache).__enter__()
    assert cache.layers[0].decider.recorder is None
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
    recording.finish(torch.zeros(2, 6, 4, dtype=torch.uint8)).save(path)
    return path


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ParameterError, match=r"x\.safetensors can't be read as a trace"):
        kvpolicy.load_trace(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(ParameterError, match=r"no\.safetensors can't be read as a trace"):
        kvpolicy.load_trace(tmp_path / "no.safetensors")


def rewrite(file, change):
    """Read the file apart, change it and write it again."""
    with safetensors.safe_open(str(file), framework="pt") as opened:
        about = json.loads(opened.metadata()["kvpolicy"])
    tensors = safetensors.load_file(file)
    change(about, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.save_file(tensors, file, metadata={"kvpolicy": json.dumps(about)})


def about(**fields):
    """Say something else in the header."""
    return lambda header, tensors: header.update(fields)


def tensor(name, make):
    """Make another tensor of one."""
    return lambda header, tensors: tensors.update({name: make(tensors[name])})


def first(value):
    """Put a value into a tensor's first place."""

    def make(old):
        old = old.clone()
        old.view(-1)[0] = value
        return old

    return make


GRID = {"rows": 6, "cols": 4, "line_break": 0, "prefix": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header, tensors: header.clear(), "format: Field required"),
        (about(format="kvpolicy-trace-99"), "a trace of format 'kvpolicy-trace-99'; this kvpolicy"),
        (about(policy=None), "policy: Input should be a valid string"),
        (about(parameters=[]), "parameters: Input should be"),
        (about(seen="many"), "seen: Input should be a valid integer"),
        (about(seen=-1), "seen: Input should be greater than or equal to 0"),
        (about(seen=2**31 - 1), "seen: Input should be less than 2147483647"),
        (about(seen=5), r"0\.gone is \[2, 2, 26\], not \[2, 2, 5\]"),
        (about(layers=[0, 1]), "layer 1 of 1 budgets"),
        (about(layers=[0, 0]), "a layer that comes twice"),
        (about(layers=[-1]), "layers: 0: Input should be greater"),
        (about(budgets=[]), "layer 0 of 0 budgets"),
        (about(budgets=[-8]), "budgets: 0: Input should be greater"),
        (about(budgets=8), "budgets: Input should be a valid array"),
        (about(grid=[1, 2]), "grid: Input should be"),
        (about(grid={**GRID, "rows": 0}), "grid: rows: Input should be greater than 0"),
        (about(grid={**GRID, "cols": -4}), "grid: cols: Input should be greater than 0"),
        (about(grid={**GRID, "cols": 4.5}), "grid: cols: Input should be a valid integer"),
        (about(grid={**GRID, "rows": 10**9}), "an image of more than 16777216 tokens"),
        (about(grid={**GRID, "line_break": 7}), "grid: line_break: Input should be less"),
        (about(grid={"rows": 6}), "grid: cols: Field required"),
        (about(grid={**GRID, "rows": 7}), "images: .* beside the grid"),
        (about(grid=None), "images: .* beside the grid None"),
        (lambda header, tensors: tensors.pop("0.gone"), "KeyError: '0.gone'"),
        (tensor("0.gone", first(0)), r"0\.gone has 0 in it"),
        (tensor("0.gone", first(27)), r"0\.gone has 27 in it"),
        (tensor("0.gone", lambda old: old.float()), r"0\.gone is torch.float32, not torch.int32"),
        (tensor("0.gone", lambda old: old[0]), r"0\.gone is"),
        (tensor("0.gone", lambda old: old[:0]), r"0\.victims is"),
        (tensor("0.decided", first(-1)), r"0\.decided has -1 in it"),
        (tensor("0.decided", first(27)), r"0\.decided has 27 in it"),
        (tensor("0.decided", first(26)), r"0\.decided falls"),
        (tensor("0.decided", lambda old: old[None]), r"0\.counts is"),
        (tensor("0.counts", lambda old: old[1:]), r"0\.counts is"),
        (tensor("0.counts", first(-1)), r"0\.victims is"),
        (tensor("0.candidates", first(10**6)), r"0\.places is"),
        (tensor("0.victims", lambda old: old[:, :1]), r"0\.victims is"),
        (tensor("0.victims", first(26)), r"0\.victims has 26 in it"),
        (tensor("0.places", first(-2)), r"0\.places has -2 in it"),
        (tensor("0.places", lambda old: old.to(torch.int8)), r"0\.places is torch.int8"),
        (tensor("0.scores", lambda old: old[..., 1:]), r"0\.scores is"),
        (tensor("0.scores", first(float("nan"))), r"0\.scores has nan in it"),
        (tensor("images", lambda old: old[:1]), r"images: \[1, 6, 4\] beside"),
        (tensor("images", lambda old: old.float()), "images: torch.float32"),
        (tensor("images", lambda old: old[0]), r"images: torch.uint8 \[6, 4\]"),
        (tensor("images", lambda old: old.repeat(1, 2, 1)), r"images: \[2, 12, 4\] beside"),
        (tensor("images", lambda old: old[..., None]), r"images: \[2, 6, 4, 1\] beside"),
        (about(prompts=["a"]), "1 prompts of"),
        (about(prompts="ab"), "prompts: Input should be a valid array"),
    ],
)
def test_a_file_that_is_no_trace(file, change, said):
    rewrite(file, change)
    with pytest.raises(ParameterError, match=rf"(?s)x\.safetensors is not a trace.*{said}"):
        kvpolicy.load_trace(file)


VALUES = st.one_of(
    st.none(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rows", "anchors", "recent", "window"]), st.integers(-3, 9)),
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_can_be_read_can_be_shown(file, data):
    """One thing in the file is something else: it is refused, or the report can be made."""
    pytest.importorskip("jinja2", reason="a report is a page")
    whole = file.read_bytes()

    def change(header, tensors):
        if data.draw(st.booleans()):
            header[data.draw(st.sampled_from(sorted(header)))] = data.draw(VALUES)
        else:
            name = data.draw(st.sampled_from(sorted(tensors)))
            old = tensors[name] = tensors[name].clone()
            place = data.draw(st.integers(0, old.numel() - 1))
            low, high = (0, 255) if name == "images" else (-(2**15), 2**15 - 1)
            old.view(-1)[place] = data.draw(st.integers(low, high))

    try:
        rewrite(file, change)
        with contextlib.suppress(kvpolicy.KVPolicyError):
            report_on_trace(file, file.with_name("report.html"))
    finally:
        file.write_bytes(whole)


def test_another_safetensors_file(tmp_path):
    safetensors.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ParameterError, match="not a trace that kvpolicy wrote"):
        kvpolicy.load_trace(tmp_path / "a.safetensors")


def test_pictures_in_colour_and_their_prompts_survive_the_file(tmp_path):
    cache = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    with kvpolicy.trace(cache) as recording:
        list(feed(cache, [3]))
    images = torch.randint(0, 255, (2, 24, 16, 3), dtype=torch.uint8)
    recording.finish(images, ["a flag", "une pêche"]).save(tmp_path / "a.safetensors")
    found = kvpolicy.load_trace(tmp_path / "a.safetensors")
    assert torch.equal(found.images, images)
    assert found.prompts == ("a flag", "une pêche")


def test_images_must_be_those_of_the_samples():
    cache = kvpolicy.PolicyCache("h2o", 8, layout=RASTER, num_layers=1)
    with kvpolicy.trace(cache) as recording:
        list(feed(cache, [3]))
    for wrong in (
        torch.zeros(3, 6, 4, dtype=torch.uint8),  # another number of them
        torch.zeros(2, 6, 5, dtype=torch.uint8),  # another grid
        torch.zeros(2, 12, 4, dtype=torch.uint8),  # two pixels a token down, one across
        torch.zeros(2, 3, 2, dtype=torch.uint8),  # less than a pixel a token
        torch.zeros(2, 6, 4, 4, dtype=torch.uint8),  # four colours
        torch.zeros(2, 6, 4),
    ):
        with pytest.raises(ParameterError, match=r"expected uint8 \[2, height, width\]"):
            recording.finish(wrong)
    with pytest.raises(ParameterError, match=r"1 prompts of .* as many prompts"):
        recording.finish(prompts=["a flag"])
    assert (recording.finish().layers[0].gone == STAYS).all()


@pytest.mark.parametrize("name", EVICTING)
def test_what_was_staged_and_taken_back_leaves_only_its_number(name, tmp_path):
    """The same trace as one by one, and how many of the staged tokens each commit accepted."""
    layout = kvpolicy.RasterLayout(rows=6, cols=4, prefix=2)
    policy = make(name)
    chance = torch.Generator().manual_seed(1)
    tensors = torch.randn(3, 2, 2, layout.length, 8, generator=chance)
    traces = []
    for staged in (True, False):
        budget = max(10, policy.min_budget(layout))
        cache = kvpolicy.PolicyCache(policy, budget, layout=layout, num_layers=1)
        with kvpolicy.trace(cache) as recording, cache.stage(7):
            while cache.seen < layout.length:
                if not staged:
                    cache.attend(0, *tensors[..., cache.seen : cache.seen + 1, :])
                    cache.commit(1)
                    continue
                at, kept = cache.seen, (3, 0, 5)[cache.stats().passes % 3]
                kept = min(kept, layout.length - at)
                run = tensors[..., at : at + 7, :].clone()
                run[..., kept:, :] = torch.randn(run[..., kept:, :].shape, generator=chance)
                cache.attend(0, *run)
                with pytest.raises(kvpolicy.CacheStateError, match="commit"):
                    recording.finish()
                cache.commit(kept)
        traces.append(recording.finish())
    ours, theirs = traces
    for field, tensor in vars(theirs.layers[0]).items():
        assert torch.equal(getattr(ours.layers[0], field), tensor), field
    assert theirs.passes.tolist() == [[seen, 1, 1] for seen in range(layout.length)]
    assert ours.passes[:3].tolist() == [[0, 7, 3], [3, 7, 0], [3, 7, 5]]
    ours.save(tmp_path / "t.safetensors")
    assert torch.equal(kvpolicy.load_trace(tmp_path / "t.safetensors").passes, ours.passes)
    for damaged in ([[0, 3, 4]], [[-1, 3, 3]], [[0, 3, 3], [2, 3, 3]], [[9, 99, 99]], [[1, 2]]):
        broken = replace(ours, passes=torch.tensor(damaged, dtype=torch.int32))
        broken.save(tmp_path / "t.safetensors")
        with pytest.raises(ParameterError, match="passes"):
            kvpolicy.load_trace(tmp_path / "t.safetensors")


def test_an_order_is_kept_and_a_damaged_one_refused(tmp_path):
    grid = kvpolicy.RasterLayout(rows=3, cols=2, prefix=1)
    layout = kvpolicy.OrderedLayout(grid=grid, order=(5, 0, 3, 1, 2, 4), groups=(1, 2, 3))
    cache = kvpolicy.PolicyCache("near", 5, layout=layout, num_layers=1)
    with kvpolicy.trace(cache) as recording:
        for _ in range(3):
            cache.attend(0, *torch.randn(3, 1, 1, 1, 8))
    found = recording.finish(torch.zeros(1, 3, 2, dtype=torch.uint8))
    assert found.grid == {"rows": 3, "cols": 2, "line_break": 0, "prefix": 1}
    path = tmp_path / "t.safetensors"
    found.save(path)
    again = kvpolicy.load_trace(path)
    assert (again.order.tolist(), again.groups.tolist()) == ([5, 0, 3, 1, 2, 4], [1, 2, 3])

    def numbers(*given):
        return torch.tensor(given, dtype=torch.int32)

    for damaged in (
        {"order": numbers(5, 0, 3, 1, 2)},
        {"order": numbers(5, 0, 3, 1, 2, 2)},
        {"order": found.order.long()},
        {"order": None},
        {"groups": numbers(1, 2)},
        {"groups": numbers(0, 3, 3)},
        {"groups": None},
        {"grid": None, "images": None},
    ):
        replace(found, **damaged).save(path)
        with pytest.raises(ParameterError, match=r"order|groups"):
            kvpolicy.load_trace(path)
