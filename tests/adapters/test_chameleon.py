"""Lumina-mGPT and Anole: transformers' Chameleon at a tiny size, drawing under a policy."""

from __future__ import annotations

import pytest
import torch
from support.image_loop import Watch, linear, sharpen

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.images.chameleon import ImageChameleon, ImageGrammar, ImageGuidance
from kvpolicy_adapters.transformers.cache_argument import as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

SMALL = {
    "linear": {"anchors": 3},
    "linear2d": {"anchors": 3},
    "pyramid": {"window": 2, "interval": 3},
    "snapkv": {"window": 2, "interval": 3},
    "rkv": {"window": 2, "interval": 3},
    "ssd": {"window": 3},
}
VOCAB = 40
IMAGES = range(4, 20)
END, START, STOP, BREAK = 20, 21, 22, 23
PAD = 1


def size(patches: int) -> int:
    """The size token of so many patches, of 2 x 2 tokens each."""
    return BREAK + patches


def image_name(number: int) -> str:
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(number)) + "Z"


NAMES = (
    {"<s>": 0, "<pad>": PAD, "</s>": 2, "<image>": 3}
    | {image_name(n): token for n, token in enumerate(IMAGES)}
    | {"<eoss>": END, "<racm3:break>": START, "<reserved08706>": STOP, "<reserved08799>": BREAK}
    | {f"<reserved{8800 + n:05d}>": size(n) for n in range(1, 6)}
)
ROWS, COLS = 6, 4
SIDE = 6
HEADER = [START, size(ROWS // 2), size(COLS // 2)]
PROMPT = torch.tensor([[0, 30, 31, 32, *HEADER]])
LINE = COLS + 1
IMAGE = ROWS * LINE
LUMINA = kvpolicy.RasterLayout(rows=ROWS, cols=COLS, line_break=1, prefix=7, suffix=2)


def tiny(names=NAMES, **vision) -> transformers.ChameleonForConditionalGeneration:
    torch.manual_seed(0)
    config = transformers.ChameleonConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=STOP,
        vocabulary_map=names,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "resolution": 2 * SIDE,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        }
        | vision,
    )
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    sharpen(model)
    return model


@pytest.fixture(scope="module")
def stock():
    return tiny()


@pytest.fixture(scope="module")
def model(stock):
    return ImageChameleon.sharing(stock)


def generate(model, prompt, cache=None, guidance=None, *, sizes=True, new=IMAGE + 1, **options):
    processors = [ImageGrammar(model, sizes=sizes)]
    if guidance is not None:
        processors.insert(0, guidance)
    settings = {
        "attention_mask": (prompt != PAD).long(),
        "max_new_tokens": new,
        "do_sample": False,
        "eos_token_id": None,
        "logits_processor": processors,
    } | options
    if cache is not None:
        settings |= as_argument(cache)
    return model.generate(prompt, **settings)


class Own:
    """The family's own cache in the place of the second one: a DynamicCache that can be reset."""

    def __new__(cls):
        cache = transformers.DynamicCache()
        cache.reset = lambda: cache.layers.clear()
        return cache


def guided(model, cache, second, scale=3.0, prompt=PROMPT, **options):
    guidance = ImageGuidance(scale, model, second, sizes=options.get("sizes", True))
    return generate(model, prompt, cache, guidance, **options)


# -- the model and its grammar ---------------------------------------------------------------------


def test_the_stock_class_hides_image_tokens_and_the_twin_does_not(stock, model):
    with torch.inference_mode():
        hidden = stock(PROMPT).logits
        drawn = model(PROMPT).logits
        last = model(PROMPT, logits_to_keep=1).logits
    assert (hidden[..., list(IMAGES)] == torch.finfo(hidden.dtype).min).all()
    others = [token for token in range(VOCAB) if token not in IMAGES]
    assert torch.equal(hidden[..., others], drawn[..., others])
    assert (drawn[..., list(IMAGES)] > -1e4).all()
    torch.testing.assert_close(last, drawn[:, -1:])
    assert model.lm_head.weight is stock.lm_head.weight
    assert model.config is stock.config


def test_drawing_with_the_stock_class_is_refused(stock):
    with pytest.raises(kvpolicy.LayoutError, match=r"draw with ImageChameleon.sharing\(model\)"):
        generate(stock, PROMPT)


def follows_lumina(tokens: list[int], rows: int, cols: int) -> None:
    """An image's tokens, behind its size tokens."""
    assert len(tokens) == rows * (cols + 1) + 1
    for position, token in enumerate(tokens[:-1]):
        if position % (cols + 1) == cols:
            assert token == BREAK
        else:
            assert token in IMAGES
    assert tokens[-1] == END


@pytest.mark.parametrize(("rows", "cols"), [(6, 4), (2, 10), (8, 2)])
def test_the_grammar_follows_the_size_tokens(model, rows, cols):
    prompt = torch.tensor([[0, 30, START, size(rows // 2), size(cols // 2)]])
    tokens = generate(model, prompt, new=rows * (cols + 1) + 1)
    follows_lumina(tokens[0, 5:].tolist(), rows, cols)


def test_sizes_are_drawn_from_size_tokens_and_text_has_no_image_tokens(model):
    for seed in range(5):
        torch.manual_seed(seed)
        prompt = torch.tensor([[0, 30, START]])
        tokens = generate(model, prompt, do_sample=True, new=140)[0].tolist()
        rows, cols = (2 * (token - BREAK) for token in tokens[3:5])
        assert {rows, cols} <= {2, 4, 6, 8, 10}
        stop = 5 + rows * (cols + 1) + 1
        follows_lumina(tokens[5:stop], rows, cols)
        text = tokens[stop : tokens.index(START, 3) if START in tokens[3:] else None]
        assert not set(text) & set(IMAGES)


def test_anoles_grammar(model):
    prompt = torch.tensor([[0, 30, 31, START]])
    tokens = generate(model, prompt, sizes=False, new=SIDE * SIDE + 3)[0, 4:].tolist()
    assert set(tokens[: SIDE * SIDE]) <= set(IMAGES)
    assert tokens[SIDE * SIDE] == END
    assert not set(tokens[SIDE * SIDE + 1 :]) & set(IMAGES)


def test_a_grammar_without_its_tokens_is_refused():
    model = tiny({name: token for name, token in NAMES.items() if name != "<reserved08799>"})
    with pytest.raises(kvpolicy.LayoutError, match=r"<reserved08799>.*ImageGrammar\(sizes=False\)"):
        ImageGrammar(model)
    ImageGrammar(model, sizes=False)


# -- lossless --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kvpolicy.available())
def test_lumina_is_lossless_when_it_fits(model, name):
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    expected = generate(model, PROMPT)
    torch.manual_seed(5)
    sampled = generate(model, PROMPT, do_sample=True)
    with attach(model, policy=policy, budget="1/1") as cache:
        assert torch.equal(generate(model, PROMPT, cache), expected)
        cache.reset()
        torch.manual_seed(5)
        assert torch.equal(generate(model, PROMPT, cache, do_sample=True), sampled)
    assert cache.stats().evictions == (0, 0)
    assert cache.policy_cache.layout == LUMINA


@pytest.mark.parametrize("name", ["linear", "h2o"])
def test_guided_lumina_is_lossless_when_it_fits(model, name):
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    expected = guided(model, transformers.DynamicCache(), Own())
    assert not torch.equal(expected, generate(model, PROMPT)), "guidance must matter"
    with (
        attach(model, policy=policy, budget="1/1") as cache,
        attach(model, policy=policy, budget="1/1") as second,
    ):
        assert torch.equal(guided(model, cache, second), expected)
    assert second.policy_cache.layout == LUMINA.model_copy(update={"prefix": 3})
    assert second.stats().evictions == (0, 0)


def test_anole_is_lossless_when_it_fits(model):
    prompt = torch.tensor([[0, 30, 31, START]])
    expected = generate(model, prompt, sizes=False, new=SIDE * SIDE + 1)
    with attach(model, policy=linear(), budget="1/1") as cache:
        drawn = generate(model, prompt, cache, sizes=False, new=SIDE * SIDE + 1)
    assert torch.equal(drawn, expected)
    assert cache.policy_cache.layout == kvpolicy.RasterLayout(
        rows=SIDE, cols=SIDE, prefix=4, suffix=1
    )
    assert cache.stats().evictions == (0, 0)


@pytest.mark.parametrize("chunks", [[7, *[1] * IMAGE], [7 + IMAGE], [2, 4, 1, 9, IMAGE - 9]])
def test_logits_equal_the_full_cache(model, chunks):
    tokens = generate(model, PROMPT)[:, : 7 + IMAGE]
    with torch.inference_mode(), attach(model, policy=linear(), budget="1/1") as cache:
        expected = model(tokens, use_cache=False).logits
        logits = [model(part, **as_argument(cache)).logits for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)
    assert cache.policy_cache.layout == LUMINA


# -- lines are right -------------------------------------------------------------------------------


def cells_at_line_ends(watch, layout, tokens, breaks):
    """Read back (row, column) from the ids that were generated, and hold them to the layout."""
    assert watch.line_ends
    for _, line, positions in watch.line_ends:
        for batch in range(positions.shape[0]):
            for head in range(positions.shape[1]):
                held = positions[batch, head]
                held = held[held >= layout.prefix].tolist()
                cells = {(layout.line(p), layout.column(p)) for p in held}
                assert len(cells) == len(held)
                for position in held:
                    ends = layout.column(position) == layout.line_length - 1
                    if breaks:
                        assert (tokens[batch, position].item() == BREAK) == ends, position
                whole = range(max(0, line - watch.recent), line + 1)
                assert {(r, c) for r in whole for c in range(layout.line_length)} <= cells
                anchors = min(watch.anchors, (line + 1) * layout.line_length)
                assert {divmod(n, layout.line_length) for n in range(anchors)} <= cells


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize(("anchors", "recent"), [(3, 1), (0, 0), (4, 1)])
def test_lines_are_right_in_both_halves_of_lumina(model, reclaim, anchors, recent):
    policy = linear(anchors, recent)
    options = {"output_logits": True, "return_dict_in_generate": True}
    expected = guided(model, transformers.DynamicCache(), Own(), **options)
    with (
        attach(model, policy=policy, budget="18", reclaim=reclaim) as cache,
        attach(model, policy=policy, budget="15", reclaim=reclaim) as second,
    ):
        watches = [Watch(half, anchors, recent) for half in (cache, second)]
        out = guided(model, cache, second, **options)
        layouts = [half.policy_cache.layout for half in (cache, second)]
    tokens = out.sequences
    gaps = [(a - b).abs().max() for a, b in zip(out.logits, expected.logits, strict=True)]
    assert max(gaps[: 2 * LINE]) < 1e-4 < max(gaps) / 100, "what was evicted must have mattered"
    follows_lumina(tokens[0, 7:].tolist(), ROWS, COLS)
    assert layouts == [LUMINA, LUMINA.model_copy(update={"prefix": 3})]
    for watch, layout, budget in zip(watches, layouts, (18, 15), strict=True):
        assert watch.calls == 2 * (IMAGE + 1 - (layout.prefix == 3))
        assert watch.decisions >= 2 * 2
        ids = tokens[:, 7 - layout.prefix :]
        cells_at_line_ends(watch, layout, ids, breaks=True)
        # What follows the last line break is certain, so it is not guided.
        assert len(watch.line_ends) == 2 * (ROWS - (watch.cache is second))
        assert max(watch.cache.stats().peak_tokens) == layout.prefix + budget


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
def test_lines_are_right_in_both_halves_of_anole(model, reclaim):
    prompt = torch.tensor([[PAD, 0, 31, START], [0, 30, 31, START]])
    with (
        attach(model, policy=linear(), budget="20", reclaim=reclaim) as cache,
        attach(model, policy=linear(), budget="1/2", reclaim=reclaim) as second,
    ):
        watches = [Watch(half, 3, 1) for half in (cache, second)]
        torch.manual_seed(4)
        tokens = guided(
            model,
            cache,
            second,
            prompt=prompt,
            sizes=False,
            new=SIDE * SIDE + 1,
            do_sample=True,
        )
        layouts = [half.policy_cache.layout for half in (cache, second)]
    grid = kvpolicy.RasterLayout(rows=SIDE, cols=SIDE, prefix=4, suffix=1)
    assert layouts == [grid, grid.model_copy(update={"prefix": 1})]
    for watch, layout in zip(watches, layouts, strict=True):
        cells_at_line_ends(watch, layout, tokens[:, 4 - layout.prefix :], breaks=False)
        assert watch.decisions >= 2 * 2
        assert len(watch.line_ends) == 2 * (SIDE - (watch.cache is second))


def test_the_layout_is_bound_by_size_tokens_that_the_model_draws(model):
    """Image start is in the prompt; the sizes come one by one."""
    prompt = torch.tensor([[0, 30, 31, START]])
    torch.manual_seed(1)
    with attach(model, policy=linear(), budget="17") as cache:
        watch = Watch(cache, 3, 1)
        tokens = generate(model, prompt, cache, do_sample=True, new=3)
        assert cache.policy_cache.layout.prefix == 6
        cache.reset()
        assert cache.policy_cache.layout is None
        generate(model, tokens[:, :6], cache, do_sample=True, new=30)
    assert watch.decisions > 0


# -- text and several images -----------------------------------------------------------------------


def sequence(*parts) -> torch.Tensor:
    chance = torch.Generator().manual_seed(9)
    tokens = []
    for part in parts:
        if isinstance(part, tuple):
            rows, cols = part
            tokens += [START, size(rows // 2), size(cols // 2)]
            for _ in range(rows):
                tokens += [*torch.randint(4, 20, (cols,), generator=chance).tolist(), BREAK]
            tokens += [END]
        else:
            tokens += part
    return torch.tensor([tokens])


@pytest.mark.parametrize("size_", [(6, 4), (8, 2)])
def test_text_and_a_second_image_keep_the_budget(model, size_):
    rows, cols = size_
    tokens = sequence([0, 30, 31], (6, 4), [33, 34, 35, 36, 33, 34, 35], size_, [37, 38])
    second = 3 + 3 + IMAGE + 1 + 7 + 3
    with torch.inference_mode(), attach(model, policy=linear(), budget="15") as cache:
        watch = Watch(cache, 3, 1)
        for token in tokens.split(1, dim=1):
            model(token, **as_argument(cache))
    layout = kvpolicy.SequenceLayout(prefix=6, pieces=((6, LINE), (second, cols + 1)))
    assert cache.policy_cache.layout == layout
    assert cache.stats().peak_tokens == (21, 21)
    assert layout.line(second) == layout.line(second - 1) + 1
    assert layout.column(second + (rows * (cols + 1)) - 1) == cols
    assert watch.decisions > 10


def test_text_and_two_images_are_lossless_when_they_fit(model):
    tokens = sequence([0, 30, 31], (6, 4), [33, 34, 35], (4, 6), [37, 38])
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
        for chunks in ([1] * tokens.shape[1], [6, 5, tokens.shape[1] - 11]):
            with attach(model, policy=linear(), budget=tokens.shape[1]) as cache:
                logits = [
                    model(part, **as_argument(cache)).logits for part in tokens.split(chunks, dim=1)
                ]
            torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)
            assert cache.stats().evictions == (0, 0)


def test_images_in_the_prompt_are_prefix(model):
    """A finished image that text follows belongs to the prompt; the next one is drawn."""
    prompt = sequence([0, 30], (4, 2), [31, 32, *HEADER])
    with attach(model, policy=linear(), budget="15") as cache:
        generate(model, prompt, cache)
    assert cache.policy_cache.layout == LUMINA.model_copy(update={"prefix": prompt.shape[1]})


def test_a_text_answer_is_kept_whole_and_other_text_layouts_are_taken(model):
    prompt = sequence([0, 30], (4, 2), [31, 32])
    expected = generate(model, prompt, new=30, suppress_tokens=[START])
    with attach(model, policy=linear(), budget="15") as cache:
        assert torch.equal(
            generate(model, prompt, cache, new=30, suppress_tokens=[START]), expected
        )
    assert cache.policy_cache.layout is None
    text = kvpolicy.TextLayout(sinks=2, line_length=4)
    with attach(model, policy=linear(), budget="15", layout=text) as cache:
        generate(model, prompt, cache, new=30, suppress_tokens=[START])
    assert cache.stats().peak_tokens == (17, 17)


def test_a_whole_sequence_at_once_is_bound_at_its_image(model):
    tokens = sequence([0, 30, 31], (6, 4))
    with torch.inference_mode():
        with attach(model, policy=linear(), budget="15") as cache:
            at_once = model(tokens, **as_argument(cache)).logits
        assert cache.policy_cache.layout == LUMINA.model_copy(update={"prefix": 6})
        with attach(model, policy=linear(), budget="15") as cache:
            parts = [model(t, **as_argument(cache)).logits for t in tokens.split(1, dim=1)]
    torch.testing.assert_close(at_once, torch.cat(parts, dim=1), atol=1e-5, rtol=0)


def test_each_image_starts_the_second_half_anew(model):
    """Two images in one generation: the unconditional cache follows each from its own header."""
    torch.manual_seed(2)
    with (
        attach(model, policy=linear(), budget="15") as cache,
        attach(model, policy=linear(), budget="15") as second,
    ):
        guidance = ImageGuidance(3.0, model, second)
        tokens = generate(model, PROMPT, cache, guidance)
        assert second.stats().seen == 3 + IMAGE - 1
        further = sequence(tokens[0].tolist(), [33], HEADER)
        generate(model, further, cache=None, guidance=guidance, new=LINE)
        assert second.stats().seen == 3 + LINE - 1


# -- bad input -------------------------------------------------------------------------------------


def test_a_budget_below_the_minimum_of_the_grid_that_is_drawn(model):
    words = r"budget=12 .* linear on RasterLayout\(rows=6, cols=4.*smallest .* works is 13"
    with (
        attach(model, policy=linear(), budget="12") as cache,
        pytest.raises(kvpolicy.BudgetError, match=words),
    ):
        generate(model, PROMPT, cache)


def test_a_further_image_too_wide_for_the_budget(model):
    tokens = sequence([0, 30, 31], (6, 4), [33], (2, 10))
    with (
        torch.inference_mode(),
        attach(model, policy=linear(), budget="15") as cache,
        pytest.raises(kvpolicy.BudgetError, match="smallest budget that works is 25"),
    ):
        for token in tokens.split(1, dim=1):
            model(token, **as_argument(cache))


def test_rows_that_open_different_images_are_refused(model):
    prompt = torch.tensor([[0, 30, START, size(3), size(2)], [0, 30, START, size(2), size(2)]])
    with (
        attach(model, policy=linear(), budget="15") as cache,
        pytest.raises(kvpolicy.LayoutError, match="opens different images in the rows"),
    ):
        generate(model, prompt, cache)


def test_sizes_that_are_no_sizes_are_refused(model):
    prompt = torch.tensor([[0, 30, START, size(3), 31]])
    with (
        attach(model, policy=linear(), budget="15") as cache,
        pytest.raises(kvpolicy.LayoutError, match="followed by token 31, which says no number"),
    ):
        model(prompt, **as_argument(cache))


def test_a_model_with_sizes_needs_them(model):
    with pytest.raises(kvpolicy.LayoutError, match="give sizes=False"):
        generate(model, torch.tensor([[0, 30, START, 5]]))


def test_embeddings_without_ids_are_refused(model):
    embedded = model.get_input_embeddings()(PROMPT)
    with (
        attach(model, policy=linear(), budget="15") as cache,
        pytest.raises(kvpolicy.LayoutError, match=r"came without ids.*layout=AfterPrompt"),
    ):
        model(inputs_embeds=embedded, **as_argument(cache))
    grid = kvpolicy.AfterPrompt(LUMINA.model_copy(update={"prefix": 0}))
    with (
        torch.inference_mode(),
        attach(model, policy=linear(), budget="15", layout=grid) as cache,
    ):
        model(inputs_embeds=embedded, **as_argument(cache))
    assert cache.policy_cache.layout == LUMINA


def test_a_vocabulary_without_image_tokens_is_refused():
    model = tiny({"<eoss>": END})
    words = r"no <racm3:break> in its config.vocabulary_map.*layout=AfterPrompt"
    with pytest.raises(kvpolicy.LayoutError, match=words), attach(model, budget=15):
        pass
