"""LlamaGen: our own implementation, and the official object (a stand-in of its shape) attached."""

from __future__ import annotations

import argparse
import threading

import pytest
import torch
from support import llamagen_standin as official
from support.image_loop import Watch, linear
from support.turns import in_turn

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.transformers.cache_argument import CACHE_ARGUMENT, as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

from kvpolicy_adapters.images.llamagen import (  # noqa: E402
    SIZES,
    LlamaGen,
    LlamaGenConfig,
    attach_official,
    read_official,
)

SIDE, LAYERS, HEADS, CAPTION = 6, 2, 2, 7
IMAGE = SIDE * SIDE
KINDS = ["c2i", "t2i"]
SMALL = {
    "linear": {"anchors": 3},
    "linear2d": {"anchors": 3},
    "pyramid": {"window": 2, "interval": 3},
    "snapkv": {"window": 2, "interval": 3},
    "rkv": {"window": 2, "interval": 3},
    "ssd": {"window": 3},
}


def make(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **SMALL.get(name, {}))


def standin(kind: str) -> official.Transformer:
    torch.manual_seed(0)
    model = official.Transformer(kind, side=SIDE, layers=LAYERS, heads=HEADS).eval()
    # Random weights attend almost uniformly; sharpened, a wrong cache changes tokens.
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wqkv.weight[: 2 * 32] *= 4
    return model


@pytest.fixture(scope="module", params=KINDS)
def theirs(request):
    return standin(request.param)


@pytest.fixture(scope="module")
def ours(theirs):
    return own(theirs)


def own(theirs) -> LlamaGen:
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    return read_official(weights, grid_size=SIDE, num_attention_heads=HEADS)


#: Two captions, one short, padded on the left.
LENGTHS = torch.tensor([3, CAPTION])
MASK = torch.arange(CAPTION)[None] >= CAPTION - LENGTHS[:, None]


def condition(kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind == "c2i":
        return torch.tensor([3, 8]), None
    captions = torch.randn(2, CAPTION, 12, generator=torch.Generator().manual_seed(4))
    return captions * MASK[..., None], MASK


def draw(model, cache=None, **options) -> torch.Tensor:
    """Ours, ``[B, tokens]``."""
    given, mask = condition(model.config.condition)
    settings = {"cfg_scale": 4.0, "do_sample": False} | options
    return model.generate(given, condition_mask=mask, **as_argument(cache), **settings).flatten(1)


def draw_theirs(model, seed: int = 0, **options) -> torch.Tensor:
    given, mask = condition(model.model_type)
    torch.manual_seed(seed)
    return official.generate(model, given, IMAGE, mask, **({"cfg_scale": 4.0} | options))


def full_mask(mask: torch.Tensor, after: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), after - mask.shape[1])], dim=1)


def forward(model, tokens, cache, chunks: list[int]) -> torch.Tensor:
    """Logits of both halves, teacher-forced: the condition, then tokens in chunks."""
    given, mask = condition(model.config.condition)
    given = torch.cat([given, model.unconditional(given)])
    tokens = torch.cat([tokens, tokens])
    after = model.config.prefix
    parts = [None, *tokens.split(chunks, dim=1)]
    logits = []
    for part in parts:
        after += 0 if part is None else part.shape[1]
        shown = None if mask is None else full_mask(torch.cat([mask, mask]), after)
        output = model(
            part,
            condition=given if part is None else None,
            attention_mask=shown,
            **as_argument(cache),
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


# -- weights ---------------------------------------------------------------------------------------


def test_the_names_and_shapes_of_the_released_checkpoints():
    layer = {
        "attention.wqkv.weight": (96, 32),
        "attention.wo.weight": (32, 32),
        "feed_forward.w1.weight": (256, 32),
        "feed_forward.w3.weight": (256, 32),
        "feed_forward.w2.weight": (32, 256),
        "attention_norm.weight": (32,),
        "ffn_norm.weight": (32,),
    }
    expected = {f"layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    expected |= {"tok_embeddings.weight": (40, 32), "norm.weight": (32,)}
    expected |= {"output.weight": (40, 32)}
    conditions = {
        "c2i": {"cls_embedding.embedding_table.weight": (1001, 32)},
        "t2i": {
            "cls_embedding.uncond_embedding": (120, 2048),
            "cls_embedding.cap_proj.fc1.weight": (32, 2048),
            "cls_embedding.cap_proj.fc2.weight": (32, 32),
        },
    }
    for kind, names in conditions.items():
        config = LlamaGenConfig(
            condition=kind,
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        found = {name: tuple(t.shape) for name, t in LlamaGen(config).state_dict().items()}
        assert found == expected | names


@pytest.mark.parametrize(
    ("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)]
)
def test_the_released_sizes(size, millions):
    config = LlamaGenConfig.of_size(size, grid_size=16)
    with torch.device("meta"):
        model = LlamaGen(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert (config.prefix, config.length) == (1, 257)
    assert LlamaGenConfig.of_size(size, condition="t2i").length == 120 + 24 * 24
    assert set(SIZES) == {"B", "L", "XL", "XXL", "3B"}


def test_a_released_size_is_known_by_its_shapes():
    config = LlamaGenConfig.of_size("B", condition="t2i", vocab_size=8, intermediate_size=4)
    with torch.device("meta"):
        weights = LlamaGen(config).state_dict()
    model = read_official(weights, grid_size=32)
    same = ("condition", "caption_length", "caption_size", "num_attention_heads", "vocab_size")
    for name in (*same, "hidden_size", "intermediate_size", "num_key_value_heads"):
        assert getattr(model.config, name) == getattr(config, name), name
    assert model.config.grid_size == 32


@pytest.mark.parametrize("nested", ["model", "module", "state_dict", None])
def test_checkpoints_of_every_writer(theirs, nested, tmp_path):
    theirs.setup_caches(1, 8, torch.float32)  # leaves caches among the weights
    weights = theirs.state_dict() | {"freqs_cis": theirs.freqs_cis}
    assert any("kv_cache" in name for name in weights)
    args = argparse.Namespace(gpt_model="GPT-B", image_size=256)
    torch.save({nested: weights, "steps": 3, "args": args} if nested else weights, tmp_path / "w")
    for layer in theirs.layers:
        layer.attention.kv_cache = None
    model = read_official(tmp_path / "w", grid_size=SIDE, num_attention_heads=HEADS)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_bfloat16_weights_stay_bfloat16(theirs):
    weights = {name: t.to(torch.bfloat16) for name, t in theirs.state_dict().items()}
    model = read_official(weights, grid_size=SIDE, num_attention_heads=HEADS)
    assert model.dtype == model.config.dtype == torch.bfloat16
    with attach(model, policy=linear(), budget=20) as cache:
        assert draw(model, cache).shape == (2, IMAGE)
    assert model._rotation(torch.device("cpu")).dtype == torch.float32


class Anything:
    """What no checkpoint should hold."""


def test_checkpoints_that_are_none(theirs, tmp_path):
    path = tmp_path / "c2i.pt"

    def read(weights, **options):
        torch.save(weights, path)
        read_official(path, **({"grid_size": SIDE, "num_attention_heads": HEADS} | options))

    good = theirs.state_dict()
    with pytest.raises(kvpolicy.ParameterError, match="checkpoint of tensors"):
        read({"model": good, "tokenizer": Anything()})
    with pytest.raises(kvpolicy.ParameterError, match="a list, not a state dict"):
        read([1, 2])
    with pytest.raises(kvpolicy.ParameterError, match=r"tok_embeddings.weight is missing"):
        read({"encoder.conv_in.weight": torch.zeros(3)})
    with pytest.raises(kvpolicy.ParameterError, match=r"layers.1.ffn_norm.weight is missing"):
        read({name: t for name, t in good.items() if name != "layers.1.ffn_norm.weight"})
    with pytest.raises(kvpolicy.ParameterError, match=r"layers.0.attention.q_norm is unknown"):
        read(good | {"layers.0.attention.q_norm": torch.zeros(3)})
    with pytest.raises(kvpolicy.ParameterError, match=r"norm.weight is \[5\] instead of \[32\]"):
        read(good | {"norm.weight": torch.zeros(5)})
    with pytest.raises(kvpolicy.ParameterError, match=r"2 layers of width 32.*num_attention_heads"):
        read(good, num_attention_heads=None)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(kvpolicy.ParameterError, match="checkpoint of tensors"):
        read_official(path, grid_size=SIDE)
    with pytest.raises(FileNotFoundError):
        read_official(tmp_path / "nowhere.pt", grid_size=SIDE)


def test_saved_and_loaded_as_a_model_of_transformers(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    again = LlamaGen.from_pretrained(tmp_path)
    assert again.config.grid_size == SIDE
    assert torch.equal(draw(again), draw(ours))


def test_random_weights_are_initialised():
    config = LlamaGenConfig(
        condition="t2i", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    model = LlamaGen(config)
    assert model.cls_embedding.uncond_embedding.std().item() == pytest.approx(2048**-0.5, rel=0.1)
    assert model.output.weight.std().item() == pytest.approx(0.02, rel=0.2)


# -- the same as the official object ---------------------------------------------------------------


@pytest.mark.parametrize("guidance", [{"cfg_scale": 1.0}, {}, {"cfg_interval": 9}])
def test_ours_draws_what_theirs_draws(theirs, ours, guidance):
    for sample in (True, False):
        expected = draw_theirs(theirs, seed=3, sample_logits=sample, **guidance)
        assert torch.equal(draw(ours, do_sample=sample, seed=3, **guidance), expected)
        for budget in ("1/1", "20"):
            results = []
            with attach(theirs, policy=linear(), budget=budget) as cache:
                results.append(draw_theirs(theirs, seed=3, sample_logits=sample, **guidance))
                held = [cache.positions(layer) for layer in range(LAYERS)]
            with attach(ours, policy=linear(), budget=budget) as cache:
                results.append(draw(ours, cache, do_sample=sample, seed=3, **guidance))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], expected) == (budget == "1/1")
            for layer in range(LAYERS):
                assert torch.equal(cache.positions(layer), held[layer])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_theirs(kind):
    theirs = standin(kind)
    ours = own(theirs)
    tokens = draw(ours)
    given, mask = condition(theirs.model_type)
    given = torch.cat([given, ours.unconditional(given)])
    count = theirs.cls_token_num + IMAGE
    visible = torch.ones(4, 1, count, count).tril().bool()
    if mask is not None:
        visible[..., :CAPTION] &= torch.cat([mask, mask])[:, None, None]
        visible |= torch.eye(count).bool()
    with torch.inference_mode():
        expected, _ = theirs(torch.cat([tokens, tokens]), given, mask=visible)
        found = forward(ours, tokens, transformers.DynamicCache(), [1] * IMAGE)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# -- ours ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(ours):
    """What it draws with its own cache: greedily, and by chance."""
    return draw(ours), draw(ours, do_sample=True, seed=1)


@pytest.mark.parametrize("name", kvpolicy.available())
def test_lossless_when_it_fits(ours, drawn, name):
    greedy, sampled = drawn
    with attach(ours, policy=make(name), budget="1/1") as cache:
        assert torch.equal(draw(ours, cache), greedy)
        cache.reset()
        assert torch.equal(draw(ours, cache, do_sample=True, seed=1), sampled)
    assert cache.stats().evictions == (0,) * LAYERS
    with torch.inference_mode(), attach(ours, policy=make(name), budget="1/1") as cache:
        expected = forward(ours, greedy, transformers.DynamicCache(), [1] * IMAGE)
        found = forward(ours, greedy, cache, [1] * IMAGE)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[1] * IMAGE, [IMAGE], [5, 1, 17, IMAGE - 23]])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_incremental_equals_at_once(ours, chunks, implementation):
    tokens = draw(ours)
    given, mask = condition(ours.config.condition)
    given = torch.cat([given, ours.unconditional(given)])
    shown = None if mask is None else full_mask(torch.cat([mask, mask]), ours.config.length)
    ours.set_attn_implementation(implementation)
    with torch.inference_mode():
        expected = ours(torch.cat([tokens, tokens]), condition=given, attention_mask=shown).logits
        found = forward(ours, tokens, transformers.DynamicCache(), chunks)
    ours.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_chunked_calls_under_eviction_equal_one_by_one(ours):
    tokens = draw(ours)
    results = []
    for chunks in ([1] * IMAGE, [IMAGE], [5, 1, 17, IMAGE - 23]):
        with torch.inference_mode(), attach(ours, policy=linear(), budget=17) as cache:
            logits = forward(ours, tokens, cache, chunks)
            held = torch.stack([cache.positions(n).sort(-1).values for n in range(LAYERS)])
        results.append((logits, held))
    assert min(cache.stats().evictions) > 0
    for logits, held in results[1:]:
        torch.testing.assert_close(logits, results[0][0], atol=2e-5, rtol=0)
        assert torch.equal(held, results[0][1])


def test_the_newest_logits_alone(ours):
    given, _ = condition(ours.config.condition)
    output = ours(draw(ours)[:, :5], condition=given, use_cache=True)
    last = ours(draw(ours)[:, :5], condition=given, logits_to_keep=1)
    torch.testing.assert_close(last.logits, output.logits[:, -1:])
    assert output[CACHE_ARGUMENT].get_seq_length() == ours.config.prefix + 5
    assert last.get(CACHE_ARGUMENT) is None


def test_a_seed_repeats_and_leaves_torch_alone(ours):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first, second = (draw(ours, do_sample=True, seed=seed) for seed in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(ours, do_sample=True, seed=2))
    assert torch.equal(torch.rand(3), expected)
    assert ours.generate(condition(ours.config.condition)[0]).shape == (2, SIDE, SIDE)


def test_narrow_draws_are_greedy_ones(ours):
    greedy = draw(ours)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        assert torch.equal(draw(ours, do_sample=True, seed=1, **narrow), greedy)
    wide = draw(ours, do_sample=True, seed=1, temperature=5.0)
    assert not torch.equal(wide, draw(ours, do_sample=True, seed=1))
    few = draw(ours, do_sample=True, seed=1, temperature=50.0, top_k=2, cfg_scale=1.0)
    assert len(few.unique()) <= len(wide.unique())


def test_the_interval_ends_guidance(ours):
    guided, plain = draw(ours), draw(ours, cfg_scale=1.0)
    assert torch.equal(draw(ours, cfg_interval=IMAGE), guided)
    cut = draw(ours, cfg_interval=10)
    assert torch.equal(cut[:, :12], guided[:, :12])
    assert not torch.equal(cut, guided)
    assert not torch.equal(guided, plain)


def test_two_threads_two_policies_one_model(ours):
    jobs = {"h2o": 8, "linear": 20, "streaming_llm": 9}

    def run(name: str) -> torch.Tensor:
        with attach(ours, policy=make(name), budget=jobs[name]) as cache:
            return draw(ours, cache)

    alone = {name: run(name) for name in jobs}
    together: dict[str, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda name=name: together.update({name: run(name)}))
        for name in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in jobs:
        assert torch.equal(together[name], alone[name]), name


# -- lines, on the real loops ----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["ours", "theirs"])
@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize(("anchors", "recent"), [(3, 1), (0, 0), (7, 1)])
def test_lines_are_right_in_the_real_loop(theirs, ours, which, reclaim, anchors, recent):
    budget = 20
    model = ours if which == "ours" else theirs
    policy = linear(anchors, recent)
    with attach(model, policy=policy, budget=budget, reclaim=reclaim) as cache:
        watch = Watch(cache, anchors, recent)
        tokens = draw(ours, cache) if which == "ours" else draw_theirs(theirs)
    assert watch.decisions == LAYERS * -(-(IMAGE - budget) // SIDE)
    assert watch.calls == LAYERS * IMAGE
    assert max(cache.stats().peak_tokens) <= theirs.cls_token_num + budget
    assert not torch.equal(tokens, draw(ours) if which == "ours" else draw_theirs(theirs))
    layout = cache.policy_cache.layout
    prefix = theirs.cls_token_num
    assert layout == kvpolicy.RasterLayout(rows=SIDE, cols=SIDE, prefix=prefix)
    assert len(watch.line_ends) == LAYERS * (SIDE - 1)  # the last token is not fed back
    for _, line, positions in watch.line_ends:
        assert positions.shape[:2] == (4, HEADS)  # conditions, and the halves without
        if reclaim == "lazy" and (line + 1) * SIDE >= budget:
            assert (positions >= 0).all(), "a slot is empty though tokens were evicted"
        for head in positions.flatten(0, 1):
            assert set(range(prefix)) <= set(head.tolist())
            image = head[head >= prefix]
            assert len(image) <= budget
            cells = set(
                zip(layout.line(image).tolist(), layout.column(image).tolist(), strict=True)
            )
            assert len(cells) == len(image)
            whole = range(max(0, line - recent), line + 1)
            assert {(row, column) for row in whole for column in range(SIDE)} <= cells
            assert {divmod(n, SIDE) for n in range(min(anchors, (line + 1) * SIDE))} <= cells
            assert max(cells) == (line, SIDE - 1)


def test_halves_and_neighbours_decide_by_themselves(ours):
    """Another image beside it, and another half, leave a row's cache as it was."""
    tokens = draw(ours)
    held = []
    for other in (tokens[1:], (tokens[1:] + 7) % 40):
        with torch.inference_mode(), attach(ours, policy=linear(), budget=17) as cache:
            forward(ours, torch.cat([tokens[:1], other]), cache, [1] * IMAGE)
            held.append(torch.stack([cache.positions(n) for n in range(LAYERS)]))
    assert torch.equal(held[0][:, [0, 2]], held[1][:, [0, 2]])
    assert not torch.equal(held[0][:, [1, 3]], held[1][:, [1, 3]])


# -- padding of captions ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *kvpolicy.available()])
@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_masked_caption_tokens_are_never_attended_to(which, name):
    """Whatever stands where the mask hides changes neither tokens nor decisions."""
    theirs = standin("t2i")
    ours = own(theirs)
    captions, mask = condition("t2i")
    results = []
    for noise in (0.0, 50.0):
        given = captions + noise * torch.randn(captions.shape) * ~mask[..., None]

        def run(given, cache=None):
            if which == "ours":
                options = {"condition_mask": mask, "cfg_scale": 4.0} | as_argument(cache)
                return ours.generate(given, do_sample=False, **options).flatten(1)
            return official.generate(theirs, given, IMAGE, mask, 4.0, sample_logits=False)

        if name is None:
            results.append((run(given), torch.zeros(1)))
            continue
        model = ours if which == "ours" else theirs
        budget = "1/1" if name == "full" else 20
        with attach(model, policy=make(name), budget=budget) as cache:
            tokens = run(given, cache)
            held = [cache.positions(layer) for layer in range(LAYERS)]
        results.append((tokens, torch.cat(held, dim=-1)))
    for clean, noisy in zip(*results, strict=True):
        assert torch.equal(clean, noisy)
    unmasked = ours.generate(captions, cfg_scale=4.0, do_sample=False).flatten(1)
    assert not torch.equal(unmasked, results[0][0]), "the mask must matter here"


def test_masked_caption_tokens_get_no_mass():
    """From image tokens, in any head, under the mask that the real loop makes."""
    ours = own(standin("t2i"))
    reports = []
    with attach(ours, policy=make("h2o"), budget=20) as cache:
        for layer in cache.policy_cache.layers:
            report = layer.report

            def keep(mass, first, room, finite=None, report=report, layer=layer):
                reports.append((first, mass, layer.store.positions.clone()))
                report(mass, first, room, finite)

            layer.report = keep
        draw(ours, cache)
    image = [(mass, held) for first, mass, held in reports if first >= CAPTION]
    assert len(image) == LAYERS * (IMAGE - 1)
    for mass, held in image:
        hidden = held[..., : mass.shape[-1]].lt(CAPTION - 3) & held[..., : mass.shape[-1]].ge(0)
        hidden = hidden.unsqueeze(2)
        assert hidden[0].sum() == HEADS * (CAPTION - 3)
        assert (mass[[0, 2]][hidden[[0, 2]]] == 0).all()
        assert (mass[[1, 3]][hidden[[1, 3]]] > 0).all()


# -- the official object, attached -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guidance"),
    in_turn(kvpolicy.available(), turn=[{"cfg_scale": 1.0}, {}, {"cfg_interval": 9}]),
)
def test_official_lossless_when_it_fits(theirs, name, guidance):
    """What is drawn twice and what a policy keeps do not know of each other."""
    expected = [draw_theirs(theirs, sample_logits=sample, **guidance) for sample in (True, False)]
    with attach(theirs, policy=make(name), budget="1/1") as cache:
        for sample, tokens in zip((True, False), expected, strict=True):
            assert torch.equal(draw_theirs(theirs, sample_logits=sample, **guidance), tokens)
    assert cache.stats().evictions == (0,) * LAYERS
    assert cache.stats().seen == theirs.cls_token_num + IMAGE - 1


def state(model) -> dict[str, object]:
    """Everything that hangs on an object and its parts."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for kind in ("__dict__", "_buffers", "_parameters", "_modules"):
            parts = getattr(module, kind)
            found |= {f"{name}.{kind}.{key}": value for key, value in parts.items()}
    return {key: value for key, value in found.items() if not isinstance(value, dict)}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_official_object_is_as_it_was_after_the_block(used, fails):
    model = standin("t2i")
    if used:
        draw_theirs(model)
    before = state(model)
    try:
        with attach(model, policy="h2o", budget=20) as cache:
            draw_theirs(model)
            if fails:
                raise RuntimeError("boom")
    except RuntimeError:
        assert fails
    after = state(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert cache.stats().seen == CAPTION + IMAGE - 1
    assert torch.equal(draw_theirs(model), draw_theirs(standin("t2i")))


@pytest.mark.parametrize("kind", KINDS)
def test_no_full_size_cache_is_made_while_attached(kind):
    """What setup_caches makes for one token goes at once; the mask is as long as the sequence."""
    theirs = standin(kind)
    with attach(theirs, policy="h2o", budget=8):
        official.MADE.clear()
        draw_theirs(theirs)
        assert set(official.MADE) == {8}
        assert not any(isinstance(part, official.StaticCache) for part in theirs.modules())
        assert theirs.causal_mask.shape == (4, *[theirs.cls_token_num + IMAGE] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_without_positions_are_untouched(kind):
    theirs = standin(kind)
    given, _ = condition(theirs.model_type)
    tokens = torch.randint(0, 40, (2, IMAGE))
    with torch.inference_mode():
        expected, _ = theirs(tokens, given)
        with attach(theirs, policy="h2o", budget=8) as cache:
            found, _ = theirs(tokens, given)
    assert torch.equal(found, expected)
    assert cache.stats().seen == 0


def test_a_generation_begins_anew_with_another_batch(theirs):
    with attach(theirs, policy=linear(), budget=20) as cache:
        first = draw_theirs(theirs)
        single = draw_theirs(theirs, cfg_scale=1.0)
        assert torch.equal(draw_theirs(theirs), first)
        assert cache.stats().seen == theirs.cls_token_num + IMAGE - 1
    assert single.shape == first.shape


def test_grouped_queries():
    """More query heads than KV heads, in ours; the official code's own cache can't hold them."""
    torch.manual_seed(2)
    config = LlamaGenConfig(
        grid_size=SIDE,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        num_classes=9,
    )
    model = LlamaGen(config).eval()
    weights = model.state_dict()
    again = read_official(weights, grid_size=SIDE, num_attention_heads=4)
    assert again.config.num_key_value_heads == 2
    with attach(model, policy="h2o", budget="1/1") as cache:
        assert torch.equal(draw(model, cache), draw(again))
    assert cache.positions(0).shape[1] == 2


# -- bad input -------------------------------------------------------------------------------------


def test_budgets_below_the_minimum_of_this_grid(theirs, ours):
    for model in (theirs, ours):
        words = r"too few for linear on RasterLayout\(rows=6.*smallest budget that works is 15"
        with (
            pytest.raises(kvpolicy.BudgetError, match=words),
            attach(model, policy=linear(), budget=9),
        ):
            pass
    assert draw_theirs(theirs).shape == (2, IMAGE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cfg_scale": 0.5}, "cfg_scale=0.5 must be at least 1"),
        ({"cfg_interval": -2}, "cfg_interval=-2 must be at least -1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ],
)
def test_options_out_of_range(ours, options, words):
    with pytest.raises(kvpolicy.ParameterError, match=words):
        draw(ours, **options)


def test_wrong_conditions():
    classes, captions = own(standin("c2i")), own(standin("t2i"))
    with pytest.raises(kvpolicy.ParameterError, match="class 10 is not one of 0 to 8"):
        classes.generate(torch.tensor([3, 10]))
    with pytest.raises(kvpolicy.ShapeError, match=r"takes classes, integers \[B\]"):
        classes.generate(torch.zeros(2, CAPTION, 12))
    with pytest.raises(kvpolicy.ParameterError, match="condition_mask is for captions"):
        classes.generate(torch.tensor([3]), condition_mask=torch.ones(1, 1))
    with pytest.raises(kvpolicy.ShapeError, match=r"embeddings of captions \[B, 7, 12\]"):
        captions.generate(torch.zeros(2, CAPTION + 1, 12))
    with pytest.raises(kvpolicy.ShapeError, match=r"expected \[2, 7\]"):
        captions.generate(torch.zeros(2, CAPTION, 12), condition_mask=MASK[:1])


def test_wrong_sequences(ours):
    given, _ = condition(ours.config.condition)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(kvpolicy.ParameterError, match="give input_ids"):
        ours()
    with pytest.raises(kvpolicy.LayoutError, match="begins with its condition"):
        ours(tokens)
    with pytest.raises(kvpolicy.LayoutError, match="is outside the image"):
        ours(torch.zeros(2, IMAGE + 1, dtype=torch.long), condition=given)
    with pytest.raises(kvpolicy.ShapeError, match="attention_mask is"):
        ours(tokens, condition=given, attention_mask=torch.ones(2, 3))
    with attach(ours, policy="h2o", budget=8) as cache:
        draw(ours, cache)
        with pytest.raises(kvpolicy.LayoutError, match="has no other"):
            ours(condition=given, **as_argument(cache))
        with pytest.raises(kvpolicy.CacheStateError, match=r"reset\(\) it"):
            draw(ours, cache)
    with pytest.raises(kvpolicy.CacheStateError, match="block has ended"):
        cache.reset()
        draw(ours, cache)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"condition": "t2v"}, "did you mean 't2i'"),
        ({"hidden_size": 100, "num_attention_heads": 10}, "multiple of four times"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"grid_size": 0}, "grid_size=0 must be at least 1"),
    ],
)
def test_wrong_configurations(fields, words):
    with pytest.raises(kvpolicy.ParameterError, match=words):
        LlamaGenConfig(**fields)
    with pytest.raises(
        kvpolicy.ParameterError, match=r"no size 'XLL'.*known: '3B', 'B', 'L', 'XL'"
    ):
        LlamaGenConfig.of_size("XLL")


def test_official_objects_that_are_not_served(theirs):
    with (
        attach(theirs, policy="h2o", budget=8),
        pytest.raises(kvpolicy.CacheStateError, match="attached already"),
        attach(theirs, policy="h2o", budget=8),
    ):
        pass
    with pytest.raises(kvpolicy.ParameterError, match="_orig_mod"), attach(torch.compile(theirs)):
        pass
    with (
        pytest.raises(kvpolicy.ParameterError, match="is not LlamaGen's Transformer"),
        attach_official(torch.nn.Linear(2, 2)),
    ):
        pass
    model = standin("c2i")
    model.block_size = 35
    with pytest.raises(kvpolicy.LayoutError, match="block_size=35 is no square"), attach(model):
        pass
    grid = kvpolicy.RasterLayout(rows=4, cols=9, prefix=1)
    with attach(model, policy="h2o", budget=8, layout=grid) as cache:
        draw_theirs(model)
    assert cache.policy_cache.layout == grid


def test_official_positions_must_follow(theirs):
    given, _ = condition(theirs.model_type)
    prefix = theirs.cls_token_num
    with torch.inference_mode(), attach(theirs, policy="h2o", budget=8):
        theirs.setup_caches(max_batch_size=2, max_seq_length=prefix + 8, dtype=torch.float32)
        theirs(None, given, torch.arange(prefix))
        words = rf"positions \[{prefix + 2}\], but the next one is {prefix}; setup_caches"
        with pytest.raises(kvpolicy.CacheStateError, match=words):
            theirs(torch.zeros(2, 1, dtype=torch.long), None, torch.tensor([prefix + 2]))
