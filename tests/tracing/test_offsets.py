"""Attention by offset, as it is watched, against a plain reading of what heads gave."""

import json

import pytest
import torch
from typer.testing import CliRunner

import kvpolicy
from kvpolicy import (
    CacheStateError,
    OrderedLayout,
    ParameterError,
    PolicyCache,
    RasterLayout,
    TextLayout,
    watch_offsets,
)
from kvpolicy.cli import app
from kvpolicy.policies import Ahead

GRID = RasterLayout(rows=3, cols=4, prefix=2)
GROUPS = OrderedLayout(grid=GRID, order=(5, 0, 11, 3, 8, 6, 1, 10, 2, 7, 4, 9), groups=(1, 2, 4, 5))
BATCH, HEADS, QUERIES = 2, 2, 4


class Plain:
    """Sums by offset of what is told to it, one number after the other."""

    def __init__(self, layout, radius):
        self.layout, self.radius, self.told = layout, radius, {}

    def tell(self, head, query, token, share):
        place = getattr(self.layout, "place", int)
        (row, column), (y, x) = (divmod(place(p) - 2, GRID.cols) for p in (query, token))
        offset = (y - row, x - column)
        if max(map(abs, offset)) > self.radius:
            offset = "far"
        self.told.setdefault((head, offset), []).append(share)

    def mean(self, head, offset):
        found = self.told.get((head, offset)) or self.told[head, "far"]
        return sum(found) / len(found)

    def check(self, heads):
        for head, offsets in enumerate(heads):
            assert offsets.far == pytest.approx(self.mean(head, "far"), rel=1e-5)
            for row, near in enumerate(offsets.near):
                for column, share in enumerate(near):
                    offset = (row - self.radius, column - self.radius)
                    assert share == pytest.approx(self.mean(head, offset), rel=1e-5), offset


def tokens(count, draw):
    query = torch.randn(BATCH, QUERIES, count, 4, generator=draw)
    return query, *(torch.randn(BATCH, HEADS, count, 4, generator=draw) for _ in range(2))


def given(cache, layer, new):
    """What each query gave to each position, by KV head, ``[B, H, T, L]``."""
    weights = cache.attend_with_weights(layer, *new)[1]
    return weights.unflatten(1, (HEADS, -1)).mean(2)


@pytest.mark.parametrize("calls", [(14,), (2, 1, 5, 6), (1,) * 14])
def test_one_by_one_each_token_looks_at_all_before_it(calls):
    draw = torch.Generator().manual_seed(0)
    caches = [PolicyCache("full", None, layout=GRID, num_layers=1) for _ in range(2)]
    plain = Plain(GRID, 1)
    with watch_offsets(caches[0], radius=1) as seen:
        for _ in range(2):  # two images
            first = 0
            for count in calls:
                new = tokens(count, draw)
                output = caches[0].attend(0, *new)
                mass = given(caches[1], 0, new)
                for query in range(max(first, 2), first + count):
                    for batch in range(BATCH):
                        for head in range(HEADS):
                            for token in range(2, query):
                                share = float(mass[batch, head, query - first, token])
                                plain.tell(head, query, token, share)
                first += count
            assert output.shape == (BATCH, QUERIES, count, 4)
            for cache in caches:
                cache.reset()
    found = seen.finish("toy")
    plain.check(found.layers[0])
    assert (found.subject, found.radius, found.queries) == ("toy", 1, 2 * BATCH * 12)


def groups(cache, layers, draw, tell=None):
    """Tokens of a group, and behind them the queries of the next one, which are taken back."""
    done, first = 0, GROUPS.prefix
    for size in GROUPS.groups:
        newest = first - done
        with cache.stage(newest + size):
            for layer in range(layers):
                new = tokens(newest + size, draw)
                visible = torch.ones(newest + size, first + size).bool()
                visible[:newest, first:] = False
                if tell is None:
                    cache.attend(layer, *new, visible=visible[None, None])
                else:
                    _, weights = cache.attend_with_weights(layer, *new, visible=visible[None, None])
                    mass = weights.unflatten(1, (HEADS, -1)).mean(2)
                    for query in range(first, first + size):
                        for token in range(2, first):
                            for head in range(HEADS):
                                for batch in range(BATCH):
                                    share = float(mass[batch, head, query - done, token])
                                    tell[layer].tell(head, query, token, share)
            cache.commit(newest)
        done, first = first, first + size


def test_in_groups_it_is_the_position_queries_that_look():
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    cache, plainly = (PolicyCache("full", None, layout=GROUPS, num_layers=2) for _ in range(2))
    plain = [Plain(GROUPS, 1) for _ in range(2)]
    with watch_offsets(cache, radius=1) as seen:
        groups(cache, 2, draws[0])
    groups(plainly, 2, draws[1], plain)
    found = seen.finish("toy")
    assert found.queries == BATCH * 12
    for layer in range(2):
        plain[layer].check(found.layers[layer])


def test_what_is_computed_is_what_it_would_be():
    outputs = []
    for watched in (False, True):
        cache = PolicyCache("full", None, layout=GRID, num_layers=1)
        draw = torch.Generator().manual_seed(2)
        if watched:
            with watch_offsets(cache):
                outputs.append([cache.attend(0, *tokens(n, draw)) for n in (3, 1, 10)])
        else:
            outputs.append([cache.attend(0, *tokens(n, draw)) for n in (3, 1, 10)])
    for plain, looked_at in zip(*outputs, strict=True):
        torch.testing.assert_close(plain, looked_at)


def test_nobody_looks_any_more_behind_the_block_also_after_an_exception():
    cache = PolicyCache("full", None, layout=GRID, num_layers=1)
    with pytest.raises(ZeroDivisionError), watch_offsets(cache) as seen:
        cache.attend(0, *tokens(5, torch.Generator().manual_seed(3)))
        _ = 1 / 0
    assert "attend" not in vars(cache)
    before = seen.finish("toy").queries
    cache.attend(0, *tokens(5, torch.Generator().manual_seed(3)))
    assert seen.finish("toy").queries == before == BATCH * 3


def test_what_would_be_wrong_in_silence_is_refused():
    evicting = PolicyCache("h2o", 6, layout=GRID, num_layers=1)
    with pytest.raises(CacheStateError, match=r"evicts \(policy 'h2o'\).*'full'"):
        watch_offsets(evicting).__enter__()
    endless = PolicyCache("streaming_llm", 6, layout=TextLayout(), num_layers=1)
    with pytest.raises(ParameterError, match="layout=TextLayout"):
        watch_offsets(endless).__enter__()
    cache = PolicyCache("full", None, layout=GRID, num_layers=2)
    for radius in (-1, 65, 1.0, True):
        with pytest.raises(ParameterError, match="from 0 to 64"):
            watch_offsets(cache, radius=radius).__enter__()
    with watch_offsets(cache) as seen:
        with pytest.raises(CacheStateError, match="watched already"):
            watch_offsets(cache).__enter__()
        with pytest.raises(CacheStateError, match="no query of layer 0"):
            seen.finish("toy")
        draw = torch.Generator().manual_seed(4)
        cache.attend(0, *tokens(14, draw))
        with pytest.raises(CacheStateError, match="no query of layer 1"):
            seen.finish("toy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "decoder", "layers"), [("fashion-lpd", "lpd:passes=9", 4), ("fashion-ar", "", 4)]
)
def test_the_command_writes_a_file_that_ahead_takes(tmp_path, subject, decoder, layers):
    out = tmp_path / "offsets.json"
    arguments = ["offsets", "--subject", subject, "--out", str(out), "--images", "3"]
    arguments += ["--radius", "2", *(["--decoder", decoder] if decoder else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"{3 * 784} queries of 8 heads in 4 layers" in result.output
    fields = json.loads(out.read_text())
    assert fields["subject"].startswith(subject)
    found = Ahead(offsets=str(out)).offsets.found
    assert found.radius == 2
    assert len(found.layers) == layers
    from kvpolicy_adapters import zoo

    if decoder:
        box = zoo.load(subject)
        layout = kvpolicy.Decoder.parse(decoder).ordered(box.grid)
        real = box.fashion.calibration_tokens(3)
        for offsets in (head for heads in found.layers for head in heads):
            assert offsets.near[2][2] == offsets.far  # nobody lies at its own place
        with box.attached(kvpolicy.create("ahead", offsets=str(out)), "1/4", layout) as cache:
            assert torch.isfinite(box.bits(real, cache)).all()


def test_more_images_than_there_are_are_refused(tmp_path):
    out = tmp_path / "offsets.json"
    arguments = ["offsets", "--subject", "fashion-ar", "--out", str(out), "--images", "300"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert "images=300 must be a whole number from 1 to 256" in str(result.exception)


def test_a_subject_that_cannot_be_watched_is_refused(tmp_path):
    arguments = ["offsets", "--subject", "support.toy_subject:Toy", "--out"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "o.json")])
    assert "has no method watched()" in str(result.exception)
