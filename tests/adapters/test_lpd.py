"""LPD: our own implementation, and the official object (a stand-in of its shape) attached."""

from __future__ import annotations

import argparse
import re

import pytest
import torch
from support import lpd_standin as official

import kvpolicy
from kvpolicy import OrderedLayout, Parallel, RasterLayout, Sampling

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

from kvpolicy_adapters import attach, decode  # noqa: E402
from kvpolicy_adapters.images.lpd import (  # noqa: E402
    LPD,
    LPDConfig,
    attach_official,
    read_official,
)

SIDE, LAYERS, HEADS = 6, 2, 2
GRID = RasterLayout(rows=SIDE, cols=SIDE, prefix=1)
DECODER = Parallel(passes=9, repulsion=1)
LAYOUT = DECODER.ordered(GRID)
LABELS = torch.tensor([1, 4, 0])
ORDERS = torch.tensor(LAYOUT.order).expand(3, -1)
MASK = official.block_causal_mask(LAYOUT.groups)
POLICIES = ("near", "h2o", "knorm")


def standin():
    torch.manual_seed(0)
    model = official.LPD(SIDE, depth=LAYERS, heads=HEADS).eval()
    # Random weights attend almost uniformly; sharpened, a wrong cache changes tokens.
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * 32] *= 4
        model.head.weight *= 4
    return model


@pytest.fixture(scope="module")
def theirs():
    return standin()


@pytest.fixture(scope="module")
def ours(theirs):
    return own(theirs)


def own(theirs, **options):
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    return read_official({"model": weights}, **({"num_attention_heads": HEADS} | options))


def draw_theirs(model, **options):
    torch.manual_seed(3)
    given = {"labels": LABELS, "attn_mask": MASK, "orders": ORDERS}
    given |= {"group_sizes": list(LAYOUT.groups), "cfg": 3.0}
    return model.sample_tokens(3, **(given | options))


def draw(model, policy, budget=None, layout=LAYOUT, **options):
    torch.manual_seed(3)
    with attach(model, policy=policy, budget=budget, layout=layout) as cache:
        tokens = model.generate(LABELS, cache=cache, **({"cfg_scale": 3.0} | options))
    return tokens.flatten(1), cache


def heard(model, act):
    """What the head said while something happened."""
    logits = []
    handle = model.head.register_forward_hook(lambda module, given, out: logits.append(out))
    try:
        act()
    finally:
        handle.remove()
    return logits


# -- the official object, attached -----------------------------------------------------------------


@pytest.mark.parametrize("guidance", [{"cfg": 1.0}, {}, {"cfg_schedule": "constant"}])
@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_the_official_object_draws_the_same_where_all_fits(theirs, policy, guidance):
    expected = draw_theirs(theirs, **guidance)
    with attach(theirs, policy=policy, layout=LAYOUT) as cache:
        assert torch.equal(draw_theirs(theirs, **guidance), expected)
        assert torch.equal(
            draw_theirs(theirs, group_sizes=str(list(LAYOUT.groups)), **guidance), expected
        )
    assert cache.stats().seen == 1 + SIDE * SIDE - LAYOUT.groups[-1]
    assert cache.stats().evictions == (0,) * LAYERS


@pytest.mark.parametrize("policy", POLICIES)
def test_queries_are_never_cached_and_the_budget_holds(theirs, policy):
    """What is cached after each pass came before it; positions of queries never stay."""
    with attach(theirs, policy=policy, budget=16, layout=LAYOUT) as cache:
        inner, held, commit = cache.policy_cache, [], cache.policy_cache.commit

        def committed(count):
            commit(count)
            held.append((inner.seen, int(inner.positions(0).max())))

        inner.commit = committed
        draw_theirs(theirs)
    ends = [1 + sum(LAYOUT.groups[:n]) for n in range(len(LAYOUT.groups))]
    assert held == [(end, end - 1) for end in ends]
    assert set(cache.stats().peak_tokens) == {17}
    assert min(cache.stats().evictions) > 0


def test_the_official_object_is_as_it_was_after_the_block(theirs):
    def state(model):
        found = {}
        for name, module in model.named_modules():
            found |= {f"{name}.{key}": value for key, value in module.__dict__.items()}
        return {key: value for key, value in found.items() if not isinstance(value, dict)}

    expected, before = draw_theirs(theirs), state(theirs)
    with pytest.raises(ZeroDivisionError), attach(theirs, policy="near", budget=16, layout=LAYOUT):
        official.MADE.clear()
        draw_theirs(theirs)
        assert not official.MADE
        raise ZeroDivisionError
    after = state(theirs)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert torch.equal(draw_theirs(theirs), expected)


def test_after_an_exception_in_the_middle_the_next_image_is_whole(theirs):
    with attach(theirs, policy="near", budget=16, layout=LAYOUT) as cache:
        expected = draw_theirs(theirs)
        broken = theirs.blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw_theirs(theirs)
        broken.remove()
        broken = theirs.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw_theirs(theirs)
        broken.remove()
        assert torch.equal(draw_theirs(theirs), expected)
    assert cache.stats().seen == 1 + SIDE * SIDE - LAYOUT.groups[-1]


def test_training_is_untouched(theirs):
    x = torch.randn(2, 37, 32)
    expected = theirs(x, MASK)
    with attach(theirs, policy="near", budget=16, layout=LAYOUT) as cache:
        assert torch.equal(theirs(x, MASK), expected)
    assert cache.stats().seen == 0


def test_what_the_official_object_may_not_be_asked_is_refused(theirs):
    def refused(words, error=kvpolicy.LayoutError, **options):
        with pytest.raises(error, match=re.escape(words)):
            draw_theirs(theirs, **options)

    with attach(theirs, policy="near", budget=16, layout=LAYOUT) as cache:
        refused("another order than the layout", orders=ORDERS.flip(1))
        refused("another order than the layout", orders=None)
        mixed = ORDERS.clone()
        mixed[1] = mixed[1].flip(0)
        refused("every image of the batch", orders=mixed)
        refused("give group_sizes=list(layout.groups)", group_sizes=[18, 18])
        refused("create_block_causal_mask", kvpolicy.ParameterError, attn_mask=None)
        assert cache.stats().seen == 0
        with (
            pytest.raises(kvpolicy.CacheStateError, match="attached already"),
            attach(theirs, policy="near", budget=16, layout=LAYOUT),
        ):
            pass
        theirs.enable_kv_cache(3, 36)
        with pytest.raises(kvpolicy.CacheStateError, match="but a pass has those of a group"):
            theirs.blocks[0].forward_inference(torch.zeros(3, 1, 32), torch.tensor([0]), MASK)

    def not_attached(words, error, model=theirs, **options):
        with pytest.raises(error, match=re.escape(words)), attach(model, **options):
            pass

    layout_error = kvpolicy.LayoutError
    not_attached("in an order that whoever draws chooses", layout_error, policy="near")
    not_attached("suffix=0) has no order", layout_error, policy="near", layout=GRID)
    other = Parallel(passes=4).ordered(RasterLayout(rows=4, cols=4, prefix=1))
    not_attached("draws 36 tokens behind a class", layout_error, policy="near", layout=other)
    not_attached(
        "policy 'linear' needs tokens line by line", layout_error, policy="linear", layout=LAYOUT
    )
    compiled = standin()
    compiled.__dict__["_orig_mod"] = theirs  # torch.compile's wrapper has it, and all other parts
    not_attached("_orig_mod", kvpolicy.ParameterError, compiled, layout=LAYOUT)
    with (
        pytest.raises(kvpolicy.ParameterError, match="not the LPD of its authors'"),
        attach_official(torch.nn.Linear(2, 2), layout=LAYOUT),
    ):
        pass


def test_raster_order_is_served_too(theirs):
    """One by one and row by row, so that policies of lines work as well."""
    layout = OrderedLayout(grid=GRID, order=range(36))
    rows = {"orders": torch.arange(36).expand(3, -1), "group_sizes": [1] * 36}
    rows["attn_mask"] = official.block_causal_mask([1] * 36)
    expected = draw_theirs(theirs, **rows)
    with attach(theirs, policy="linear", layout=layout):
        assert torch.equal(draw_theirs(theirs, **rows), expected)
    policy = kvpolicy.create("linear", anchors=3)
    with attach(theirs, policy=policy, budget="3 lines", layout=layout) as cache:
        draw_theirs(theirs, **rows)
    assert set(cache.stats().peak_tokens) == {1 + 18}


# -- ours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "constant", None])
def test_ours_is_the_official_object(theirs, ours, schedule):
    asked = {"cfg": 1.0} if schedule is None else {"cfg_schedule": schedule}
    given = {"cfg_scale": 1.0} if schedule is None else {"cfg_schedule": schedule}
    tokens = {}
    expected = heard(theirs, lambda: tokens.update(theirs=draw_theirs(theirs, **asked)))
    found = heard(ours, lambda: tokens.update(ours=draw(ours, "full", **given)[0]))
    assert torch.equal(tokens["ours"], tokens["theirs"])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[:, -one.shape[1] :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_ours_and_the_official_object_evict_alike(theirs, ours, policy):
    found, cache = draw(ours, policy, 16)
    with attach(theirs, policy=policy, budget=16, layout=LAYOUT) as other:
        assert torch.equal(draw_theirs(theirs), found)
    for layer in range(LAYERS):
        assert torch.equal(cache.positions(layer), other.positions(layer))
    assert set(cache.stats().peak_tokens) == {17}


def test_where_heads_look_is_seen_of_both_and_ahead_goes_by_it(theirs, ours, tmp_path):
    looked = {}
    plainly, _ = draw(ours, "full")
    torch.manual_seed(3)
    with (
        attach(ours, policy="full", layout=LAYOUT) as cache,
        kvpolicy.watch_offsets(cache, radius=2) as seen,
    ):
        assert torch.equal(ours.generate(LABELS, cache=cache, cfg_scale=3.0).flatten(1), plainly)
    looked["ours"] = seen.finish("ours")
    with (
        attach(theirs, policy="full", layout=LAYOUT) as cache,
        kvpolicy.watch_offsets(cache, radius=2) as seen,
    ):
        assert torch.equal(draw_theirs(theirs), plainly)
    looked["theirs"] = seen.finish("theirs")
    for one, other in zip(looked["ours"].layers, looked["theirs"].layers, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.far == pytest.approx(b.far, rel=1e-3)
            for found, expected in zip(a.near, b.near, strict=True):
                assert found == pytest.approx(expected, rel=1e-3)
    # Guidance doubles the batch.
    assert looked["ours"].queries == looked["theirs"].queries == 2 * 3 * SIDE**2
    file = tmp_path / "offsets.json"
    file.write_text(looked["ours"].text())
    by_offset, cache = draw(ours, kvpolicy.create("ahead", offsets=str(file)), 16)
    assert set(cache.stats().peak_tokens) == {17}
    by_distance, _ = draw(ours, "ahead", 16)
    assert not torch.equal(by_offset, by_distance)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_forward_without_a_cache(ours, implementation):
    """All groups at once with the mask of training: the logits that the cache gives."""
    tokens, _ = draw(ours, "full", cfg_scale=1.0, sampling=Sampling(temperature=0))
    places = torch.tensor(LAYOUT.order)
    arrived = tokens[:, places]
    content = torch.cat(
        [ours.embed_class(LABELS[:, None]), ours.embed_tokens(arrived, places)], dim=1
    )
    hidden = torch.cat([content, ours.embed_queries(places).expand(3, -1, -1)], dim=1)
    group = torch.repeat_interleave(torch.arange(9), torch.tensor(LAYOUT.groups))
    mine = torch.cat([torch.tensor([-1]), group, group])
    query = torch.arange(73) >= 37
    visible = (~query & (mine < mine[:, None])) | (
        (query == query[:, None]) & (mine == mine[:, None])
    )
    before = ours.config._attn_implementation
    try:
        ours.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = ours(hidden, visible[None, None], logits_to_keep=36).logits
    finally:
        ours.set_attn_implementation(before)
    assert torch.equal(logits.argmax(-1), arrived)


def test_a_file_is_read_without_unpickling(theirs, tmp_path):
    path = tmp_path / "lpd.pth"
    about = {"epoch": 450, "args": argparse.Namespace(model="lpd_l"), "optimizer": {"state": {}}}
    torch.save({"model": theirs.state_dict(), **about}, path)
    model = read_official(path, num_attention_heads=HEADS)
    assert model.config.grid == GRID
    assert (model.config.num_classes, model.config.intermediate_size) == (5, 96)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(draw(model, "near", 16)[0], draw(own(theirs), "near", 16)[0])
    torch.save({"model": theirs}, path)
    with pytest.raises(kvpolicy.ParameterError, match="can't be read as a checkpoint of tensors"):
        read_official(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(kvpolicy.ParameterError, match="can't be read as a checkpoint of tensors"):
        read_official(path)


def test_weights_that_are_no_lpd_are_refused(theirs):
    weights = theirs.state_dict()

    def refused(words, given, **options):
        with pytest.raises(kvpolicy.ParameterError, match=re.escape(words)):
            read_official(given, **({"num_attention_heads": HEADS} | options))

    refused("mask_token is missing", {n: w for n, w in weights.items() if n != "mask_token"})
    refused(
        "blocks.1.norm2.bias is missing",
        {n: w for n, w in weights.items() if n != "blocks.1.norm2.bias"},
    )
    refused("head.bias is unknown", weights | {"head.bias": torch.zeros(40)})
    refused("no class and a square", weights | {"pos_embed": torch.zeros(1, 36, 32)})
    refused("no released LPD has 2 layers of width 32", weights, num_attention_heads=None)
    refused("multiple of num_attention_heads=3", weights, num_attention_heads=3)


@pytest.mark.parametrize("size", ["L", "XL", "XXL"])
def test_released_sizes(size):
    """By the names and shapes of their weights alone, heads and grid are found."""
    config = LPDConfig.of_size(size, grid_size=32)
    with torch.device("meta"):
        weights = LPD(config).state_dict()
    made = read_official(weights).config
    assert made.to_diff_dict() == config.to_diff_dict() | {"dtype": "float32"}
    assert config.hidden_size // config.num_attention_heads == 64


def test_what_ours_can_not_do_is_refused(ours):
    with pytest.raises(kvpolicy.ParameterError, match=r"no size 'M'.*known: 'L', 'XL', 'XXL'"):
        LPDConfig.of_size("M")
    with pytest.raises(kvpolicy.ParameterError, match="grid_size=0"):
        LPDConfig(grid_size=0)

    def refused(words, error, layout=LAYOUT, labels=LABELS, **options):
        with attach(ours, policy="full", layout=layout) as cache:
            with pytest.raises(error, match=re.escape(words)):
                ours.generate(labels, cache=cache, **options)
            assert cache.get_seq_length() == 0

    parameter, layout_error = kvpolicy.ParameterError, kvpolicy.LayoutError
    refused("class 6 is not one of 0 to 4", parameter, labels=torch.tensor([6]))
    refused("not int64 [B]", kvpolicy.ShapeError, labels=LABELS[:, None])
    refused("at least 1, which is no guidance", parameter, cfg_scale=0.5)
    refused("cfg_schedule='cosine' is none of", parameter, cfg_scale=2.0, cfg_schedule="cosine")
    refused("draws in 7 passes", parameter, decoder=Parallel(passes=7))
    refused("needs a cache with an OrderedLayout", layout_error, layout=GRID)
    other = Parallel(passes=4).ordered(RasterLayout(rows=4, cols=9, prefix=1))
    refused("OrderedLayout of RasterLayout(rows=6", layout_error, layout=other)
    with pytest.raises(layout_error, match="in an order that whoever draws chooses"), attach(ours):
        pass
    with attach(ours, policy="full", layout=LAYOUT) as cache:
        with pytest.raises(parameter, match=re.escape("model.generate(classes, cache=cache")):
            decode(ours, LABELS[:, None], cache, 36)
        ours.generate(LABELS, cache=cache)
        with pytest.raises(kvpolicy.CacheStateError, match="reset"):
            ours.generate(LABELS, cache=cache)
    theirs = standin()
    with (
        attach(theirs, policy="full", layout=LAYOUT) as cache,
        pytest.raises(parameter, match="draw with its own sample_tokens"),
    ):
        decode(theirs, LABELS, cache, 36)
