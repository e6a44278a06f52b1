"""fashion-lpd: pixels in any order, many at once, under any policy that works there."""

from __future__ import annotations

import math
import shutil
from importlib.resources import files

import pytest
import torch
from torch.nn import functional

import kvpolicy
from kvpolicy import Parallel
from kvpolicy.lab.search.oracle import GroupOracle
from kvpolicy_adapters import attach, zoo
from kvpolicy_adapters.zoo.fashion_lpd import LPD_FILES, read_fashion_lpd

FOLDER = files("kvpolicy_adapters.zoo").joinpath("fashion_lpd")


@pytest.fixture(scope="module")
def box():
    return zoo.load("fashion-lpd")


def bits(box, policy, budget, layout, count=4):
    with box.attached(policy, budget, layout) as cache:
        found = box.bits(box.fashion.test_tokens(count), cache)
        return found, cache.stats()


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
