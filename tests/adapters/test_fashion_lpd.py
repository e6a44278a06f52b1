"""fashion-lpd: pixels in any order, many at once, under any policy that works there."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from torch.nn import functional

import kvpolicy
from kvpolicy import Parallel
from kvpolicy.lab.run.plan import Plan
from kvpolicy.lab.run.runner import prepare
from kvpolicy.lab.run.subject import Setting
from kvpolicy.lab.search.oracle import GroupOracle
from kvpolicy_adapters import attach, zoo
from kvpolicy_adapters.images.guidance import guided_groups
from kvpolicy_adapters.images.sampling import RowSampler
from kvpolicy_adapters.zoo.fashion_lpd import LPD_FILES, read_fashion_lpd

FOLDER = files("kvpolicy_adapters.zoo").joinpath("fashion_lpd")


@pytest.fixture(scope="module")
def box():
    return zoo.load("fashion-lpd")


def bits(box, policy, budget, layout, count=4):
    with box.attached(policy, budget, layout) as cache:
        found = box.bits(box.fashion.test_tokens(count), cache)
        return found, cache.stats()


def test_guidance_is_constant_unless_it_is_said_to_rise(box):
    decoder, classes = Parallel(passes=16), torch.arange(2)

    def drawn(**schedule):
        with box.attached("full", None, box.layout(decoder)) as cache:
            return box.decode(classes, cache, decoder, seed=0, cfg_scale=3.0, **schedule).tokens

    assert torch.equal(drawn(), drawn(cfg_schedule="constant"))
    assert not torch.equal(drawn(), drawn(cfg_schedule="linear"))


def test_it_is_as_large_as_the_card_says(box):
    card = box.card
    assert card.parameters == sum(param.numel() for param in box.model.parameters())
    assert abs(card.parameters / box.fashion.card.parameters - 1) < 0.2
    assert card.model_bytes == FOLDER.joinpath("model.safetensors").stat().st_size < 8 * 2**20


def test_the_card_is_not_a_wish(box):
    """On a few of its images: real ones differ, so against what fashion-ar says of the same."""
    tokens = box.fashion.test_tokens(4)
    with torch.no_grad():
        logits = box.fashion.model(tokens[:, :-1]).logits
    nats = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
    theirs = float(nats) / math.log(2)
    few, _ = bits(box, "full", None, Parallel(passes=32).ordered(box.grid), 4)
    assert 1.0 < float(few.mean()) / theirs < 1.3


def test_a_cache_gives_what_attention_without_one_gives(box):
    """One group at a time through the cache, and one pass of the network with a mask of its own."""
    layout = Parallel(passes=6).ordered(box.grid)
    tokens = box.fashion.test_tokens(2)
    through, _ = bits(box, "full", None, layout, 2)
    places = layout.place(torch.arange(785))
    arrived = tokens[:, places]
    content = torch.cat(
        [
            box.model.embed_class(arrived[:, :1]),
            box.model.embed_pixels(arrived[:, 1:], places[1:] - 1),
        ],
        dim=1,
    )
    hidden = torch.cat([content, box.model.embed_queries(places[1:] - 1).expand(2, -1, -1)], dim=1)
    group = torch.repeat_interleave(torch.arange(6), torch.tensor(layout.groups))
    mine = torch.cat([torch.tensor([-1]), group, group])
    query = torch.arange(len(mine)) >= 785
    earlier = ~query[None] & (mine[None] < mine[:, None])
    same = (query[None] == query[:, None]) & (mine[None] == mine[:, None])
    with torch.no_grad():
        logits = box.model.llama(
            inputs_embeds=hidden,
            position_ids=torch.cat([places, places[1:] - 1]).expand(2, -1),
            attention_mask=(earlier | same)[None, None],
            use_cache=False,
        ).logits[:, 785:]
    nats = functional.cross_entropy(logits.transpose(1, 2), arrived[:, 1:], reduction="none")
    expected = nats.double().mean(1) / math.log(2)
    torch.testing.assert_close(through, expected, atol=1e-4, rtol=0)


def test_it_draws_under_a_policy_within_its_budget(box):
    decoder = Parallel(passes=12)
    layout = decoder.ordered(box.grid)
    drawn = []
    for _ in range(2):
        with box.attached("near", "1/4", layout) as cache:
            drawn.append(box.draw(torch.tensor([1, 9]), cache, decoder, seed=3))
            assert set(cache.stats().peak_tokens) == {197}
            assert sum(cache.stats().evictions) > 0
    assert drawn[0].shape == (2, 784)
    assert 0 <= int(drawn[0].min()) <= int(drawn[0].max()) < 16
    assert torch.equal(*drawn)


def test_guidance_is_the_formula(box):
    """Half of the batch has no class, both have the same pixels; the scale rises by arrival."""
    layout, real = Parallel(passes=6).ordered(box.grid), box.fashion.test_tokens(2)
    arrived = real[:, layout.place(torch.arange(785))]
    ask, first = layout.groups[2], 1 + sum(layout.groups[:2])

    def logits(tokens, schedule=None):
        """The class, then all that came, and queries behind it."""
        with torch.no_grad(), box.attached("full", None, layout) as cache:
            step = box.step(cache)
            if schedule is not None:
                step = guided_groups(step, cache, 26, 3.0, schedule)
            with cache.stage(first + ask):
                step(tokens[:, :1], 1)
                cache.commit(1)
                return step(tokens[:, 1:first], ask)

    nothing = torch.cat([torch.full((2, 1), 26), arrived[:, 1:]], dim=1)
    known, unknown = logits(arrived), logits(nothing)
    for schedule in ("linear", "constant"):
        found = logits(arrived, schedule)
        index = torch.arange(first - 1, first - 1 + ask)
        scale = 1 + 2.0 * index / 784 if schedule == "linear" else torch.full((ask,), 3.0)
        expected = unknown + scale[:, None] * (known - unknown)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_near_keeps_more_than_chance_does_and_ahead_more_than_near(box):
    layout = Parallel(passes=16).ordered(box.grid)
    full, ahead, near, random = (
        float(bits(box, *setting, layout, 2)[0].mean())
        for setting in (("full", None), ("ahead", "1/4"), ("near", "1/4"), ("random", "1/4"))
    )
    assert full < ahead < near < random


def test_an_oracle_knows_what_groups_will_look_at(box):
    layout = Parallel(passes=16).ordered(box.grid)
    tokens = box.fashion.test_tokens(2)
    given = box.looks(tokens, layout)
    ends = torch.tensor(layout.groups).cumsum(0) + layout.prefix
    for mass in given:
        assert mass.shape == (2, 2, 16, 785)
        for group, size in enumerate(layout.groups):
            # Of queries and tokens; queries give a part to each other.
            assert 0 < float(mass[:, :, group].sum(-1).max()) <= 2 * size + 1e-3
            assert not mass[:, :, group, ends[group] :].any()
    oracle = GroupOracle.of(given, groups=4)
    with box.attached(oracle, "1/8", layout) as cache:
        clairvoyant = float(box.bits(tokens, cache).mean())
    full, random = (
        float(bits(box, *setting, layout, 2)[0].mean())
        for setting in (("full", None), ("random", "1/8"))
    )
    assert full < clairvoyant < random
    with (
        box.attached(oracle, "1/8", layout) as cache,
        pytest.raises(kvpolicy.ParameterError, match="has recorded 2 images and is asked about 1"),
    ):
        box.bits(tokens[:1], cache)


LPD_SUBJECT = "kvpolicy_adapters.evaluation.subjects:FashionLPD"


def plan(**fields):
    options = {"scored": 2, "images": 10, "batch": 5}
    given = {"subject": LPD_SUBJECT, "options": options, "decoders": ["lpd:passes=8"]}
    return Plan(**(given | {"policies": ["near"], "budgets": ["1/4"]} | fields))


def test_it_is_a_subject_of_ablations(tmp_path):
    prepared = prepare(plan(metrics=["bits_per_pixel", "frechet", "passes", "peak_tokens"]))
    cells = [cell for cell in prepared.cells if cell.decoder != "sequential"]
    assert [cell.label for cell in cells] == ["full@lpd:passes=8", "near@lpd:passes=8"]
    subject = prepared.subject
    for cell in cells:
        setting = Setting(kvpolicy.create(cell.policy), cell.budget, Parallel(passes=8))
        measured = subject.measure(setting, 0, prepared.plan.metrics)
        assert measured.arrays["bits"].shape == (2,)
        assert measured.arrays["passes"].tolist() == [8] * 10
        assert measured.images.shape == (10, 28, 28)
        assert max(measured.stats.peak_tokens) <= (197 if cell.policy == "near" else 785)
        assert subject.estimate(setting) > 0
    (tmp_path / "t.safetensors").write_bytes(subject.trace(setting, 0))
    found = kvpolicy.load_trace(tmp_path / "t.safetensors")
    assert found.order.tolist() == list(subject.layout_under(Parallel(passes=8)).order)
    assert found.passes.shape == (8, 3)


def test_what_can_not_be_ablated_is_refused_or_left_out_by_name():
    with pytest.raises(kvpolicy.LayoutError, match=r"'linear' needs .* work: .*near"):
        prepare(plan(policies=["linear"]))
    both = prepare(plan(policies=["linear", "near"], decoders=["sequential", "lpd:passes=8"]))
    assert [item.label for item in both.left_out] == ["linear@lpd:passes=8"]
    assert "needs tokens line by line" in both.left_out[0].reason
    assert "near@lpd:passes=8" in [cell.label for cell in both.cells]
    assert "linear" in [cell.label for cell in both.cells]
    words = "'sjd' asks for what comes behind each token; 'lpd:passes=48' and 'sequential' work"
    with pytest.raises(kvpolicy.ParameterError, match=words):
        prepare(plan(decoders=["sjd"]))
    with pytest.raises(kvpolicy.LayoutError, match="subject 'fashion-ar': decoder 'lpd:passes=48'"):
        prepare(plan(subject="fashion-ar", options={}, decoders=["lpd:passes=48"]))
    with pytest.raises(kvpolicy.ParameterError, match=r"fashion-lpd: cfg=0\.5 must be a number"):
        prepare(plan(options={"cfg": 0.5}))


def test_row_by_row(box):
    """The sequential decoder's order is raster: policies of lines serve, images are their own."""
    small = replace(box, grid=kvpolicy.RasterLayout(rows=3, cols=28, prefix=1))
    decoder = kvpolicy.Sequential()
    layout = small.layout(decoder)
    assert layout.in_raster_order
    chances = torch.rand(2, 84, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def draw(rows, policy, budget):
        with small.attached(policy, budget, layout) as cache:
            rule = RowSampler(chances[rows])
            drawn = small.decode(torch.tensor([1, 8])[rows], cache, decoder, rules=(rule,))
            assert (drawn.passes, max(cache.stats().peak_tokens)) == (84, 57 if budget else 84)
        return drawn.tokens

    both = draw([0, 1], "streaming_llm", 56)
    assert torch.equal(both[1:], draw([1], "streaming_llm", 56))
    assert not torch.equal(both, draw([0, 1], "full", None))
    with torch.no_grad(), small.attached("full", None, layout) as cache:
        expected = small.bits(box.fashion.test_tokens(2)[:, :85], cache)
    with torch.no_grad(), small.attached("linear", None, layout) as cache:
        found = small.bits(box.fashion.test_tokens(2)[:, :85], cache)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_cache_without_an_order_is_refused(box):
    with (
        attach(box.model.llama, policy="full", layout=box.grid) as cache,
        pytest.raises(kvpolicy.ParameterError, match="needs a cache with an OrderedLayout"),
    ):
        box.bits(box.fashion.test_tokens(1), cache)


@pytest.mark.parametrize("name", LPD_FILES)
def test_a_damaged_file_is_refused(box, tmp_path, name):
    folder = tmp_path / "fashion_lpd"
    shutil.copytree(str(FOLDER), folder)
    with (folder / name).open("r+b") as file:
        file.seek(100)
        file.write(b"!!")
    with pytest.raises(zoo.CorruptFileError, match=rf"{name} is damaged: SHA-256"):
        read_fashion_lpd(folder, box.fashion)
    (folder / "card.json").write_text("{}")
    with pytest.raises(zoo.CorruptFileError, match=r"card\.json can't be read"):
        read_fashion_lpd(folder, box.fashion)
