"""Emu3: the real class at a tiny size, drawing with its token rule, under a policy."""

from __future__ import annotations

import pytest
import torch
from support.image_loop import Watch, linear, sharpen

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.images.emu3 import GridRule
from kvpolicy_adapters.images.guidance import Guidance
from kvpolicy_adapters.transformers.cache_argument import as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

SMALL = {
    "linear": {"anchors": 3},
    "pyramid": {"window": 2, "interval": 3},
    "snapkv": {"window": 2, "interval": 3},
    "rkv": {"window": 2, "interval": 3},
    "ssd": {"window": 3},
}
PAD, BOS, EOS = 0, 1, 2
BOI, WRAPPER, EOI, EOL, EOF = 16, 17, 18, 19, 20
IMAGES = range(24, 48)
#: "12" is a token of its own, as merges may have it.
NAMES = (
    {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<image>": 3}
    | {str(digit): 4 + digit for digit in range(10)}
    | {"*": 14, "12": 15}
    | {"<|image start|>": BOI, "<|image token|>": WRAPPER, "<|image end|>": EOI}
    | {"<|extra_200|>": EOL, "<|extra_201|>": EOF, "a": 21, "cat": 22, "blurry": 23}
    | {f"<|visual token {n:06d}|>": token for n, token in enumerate(IMAGES)}
)
ROWS, COLS = 6, 4
LINE = COLS + 1
IMAGE = ROWS * LINE
NEW = IMAGE + 3


def header(rows: int, cols: int) -> list[int]:
    return [BOI, *(4 + int(d) for d in str(rows)), 14, *(4 + int(d) for d in str(cols)), WRAPPER]


PROMPTS = torch.tensor([[PAD, BOS, 22, *header(ROWS, COLS)], [BOS, 21, 22, *header(ROWS, COLS)]])
NEGATIVE = torch.tensor([[BOS, 23, *header(ROWS, COLS)]] * 2)
PREFIX = PROMPTS.shape[1]
GRID = kvpolicy.RasterLayout(rows=ROWS, cols=COLS, line_break=1, prefix=PREFIX, suffix=3)


def tiny(names=NAMES) -> transformers.Emu3ForConditionalGeneration:
    torch.manual_seed(0)
    config = transformers.Emu3Config(
        text_config={
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        vq_config={
            "codebook_size": 24,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 1,
        },
        vocabulary_map=names,
    )
    model = transformers.Emu3ForConditionalGeneration(config).eval()
    sharpen(model)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def generate(model, cache=None, second=None, prompts=PROMPTS, **options):
    """The generation of the family's documentation; guided by transformers, or with a second
    cache by the adapter."""
    settings = {
        "attention_mask": (prompts != PAD).long(),
        "max_new_tokens": NEW,
        "do_sample": False,
        "prefix_allowed_tokens_fn": GridRule(model),
    } | options
    if cache is not None:
        settings |= as_argument(cache)
    if second is not None:
        settings["logits_processor"] = [Guidance(3.0, model, second, NEGATIVE)]
    return model.generate(prompts, **settings)


def guided(model, **options):
    mask = torch.ones_like(NEGATIVE)
    return generate(
        model,
        guidance_scale=3.0,
        negative_prompt_ids=NEGATIVE,
        negative_prompt_attention_mask=mask,
        **options,
    )


# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols"), [(6, 4), (2, 7), (1, 1), (12, 3)])
def test_the_rule_draws_the_size_of_the_prompt(model, rows, cols):
    prompt = torch.tensor([[BOS, 22, *header(rows, cols)]])
    new = rows * (cols + 1)
    tokens = generate(model, prompts=prompt, max_new_tokens=new + 9)[0, prompt.shape[1] :].tolist()
    for position, token in enumerate(tokens[:new]):
        if position % (cols + 1) == cols:
            assert token == EOL
        else:
            assert token in IMAGES
    assert tokens[new:] == [EOF, EOI, EOS]


def test_a_rule_serves_generations_one_after_the_other(model):
    rule = GridRule(model)
    for rows, cols in ((2, 3), (3, 2)):
        prompt = torch.tensor([[BOS, 22, *header(rows, cols)]])
        tokens = generate(model, prompts=prompt, prefix_allowed_tokens_fn=rule)
        assert (tokens == EOL).sum() == rows


def test_rows_that_are_done_are_padded(model):
    rule = GridRule(model)
    done = torch.tensor([BOS, *header(1, 1), 25, EOL, EOF, EOI, EOS])
    assert rule(0, done).tolist() == [PAD]
    assert rule(0, torch.cat([done, torch.tensor([PAD])])).tolist() == [PAD]


def test_what_is_drawn_decodes_to_pixels(model):
    tokens = generate(model)[:, PREFIX:]
    pixels = model.decode_image_tokens(image_tokens=tokens, height=ROWS, width=COLS)
    assert pixels.shape == (2, 3, 2 * ROWS, 2 * COLS)


# -- lossless --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kvpolicy.available())
def test_lossless_when_it_fits(model, name):
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    expected = generate(model)
    torch.manual_seed(5)
    sampled = generate(model, do_sample=True)
    with attach(model, policy=policy, budget="1/1") as cache:
        assert torch.equal(generate(model, cache), expected)
        cache.reset()
        torch.manual_seed(5)
        assert torch.equal(generate(model, cache, do_sample=True), sampled)
    assert cache.stats().evictions == (0, 0)
    assert cache.policy_cache.layout == GRID


@pytest.mark.parametrize("name", ["linear", "h2o"])
def test_guided_it_is_lossless_when_it_fits(model, name):
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    expected = guided(model)
    assert not torch.equal(expected, generate(model)), "guidance must matter"
    with (
        attach(model, policy=policy, budget="1/1") as cache,
        attach(model, policy=policy, budget="1/1") as second,
    ):
        with pytest.raises(kvpolicy.ModelError, match="guidance_scale makes a second cache"):
            guided(model, cache=cache)
        cache.reset()
        assert torch.equal(generate(model, cache, second), expected)
    assert second.stats().seen == NEGATIVE.shape[1] + NEW - 1
    assert second.policy_cache.layout == GRID.model_copy(update={"prefix": NEGATIVE.shape[1]})


def test_logits_equal_the_full_cache(model):
    tokens = generate(model)[:, : PREFIX + IMAGE]
    mask = (tokens != PAD).long()
    with torch.inference_mode():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        for chunks in ([PREFIX, *[1] * IMAGE], [3, PREFIX - 3, 8, IMAGE - 8], [PREFIX + IMAGE]):
            with attach(model, policy=linear(), budget="1/1") as cache:
                logits, seen = [], 0
                for part in tokens.split(chunks, dim=1):
                    seen += part.shape[1]
                    logits.append(
                        model(part, attention_mask=mask[:, :seen], **as_argument(cache)).logits
                    )
            shown = mask.bool()  # rows of padding say nothing
            torch.testing.assert_close(
                torch.cat(logits, dim=1)[shown], expected[shown], atol=1e-5, rtol=0
            )


# -- lines are right -------------------------------------------------------------------------------


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize(("anchors", "recent"), [(3, 1), (0, 0)])
def test_lines_are_right_in_both_halves(model, reclaim, anchors, recent):
    policy = linear(anchors, recent)
    options = {"output_logits": True, "return_dict_in_generate": True}
    expected = guided(model, **options)
    with (
        attach(model, policy=policy, budget="1/2", reclaim=reclaim) as cache,
        attach(model, policy=policy, budget="3 lines", reclaim=reclaim) as second,
    ):
        watches = [Watch(half, anchors, recent) for half in (cache, second)]
        out = generate(model, cache, second, **options)
        layouts = [half.policy_cache.layout for half in (cache, second)]
    gaps = [(a - b).abs().max() for a, b in zip(out.logits, expected.logits, strict=True)]
    assert max(gaps[: 2 * LINE]) < 1e-4 < max(gaps) / 100, "what was evicted must have mattered"
    assert layouts == [GRID, GRID.model_copy(update={"prefix": NEGATIVE.shape[1]})]
    for watch, layout, budget in zip(watches, layouts, (16, 15), strict=True):
        assert watch.calls == 2 * NEW
        assert watch.decisions >= 2 * 3
        assert watch.cache.stats().peak_tokens == (layout.prefix + budget,) * 2
        tokens = out.sequences[:, PREFIX - layout.prefix :]
        assert len(watch.line_ends) == 2 * ROWS
        for _, line, positions in watch.line_ends:
            for batch in range(2):
                for head in range(2):
                    held = positions[batch, head]
                    held = held[held >= layout.prefix].tolist()
                    cells = {(layout.line(p), layout.column(p)) for p in held}
                    assert len(cells) == len(held)
                    for position in held:
                        ends = layout.column(position) == COLS
                        assert (tokens[batch, position].item() == EOL) == ends
                    whole = range(max(0, line - recent), line + 1)
                    assert {(r, c) for r in whole for c in range(LINE)} <= cells
                    assert {divmod(n, LINE) for n in range(anchors)} <= cells


def test_text_and_a_second_image_keep_the_budget(model):
    chance = torch.Generator().manual_seed(9)
    tokens = [BOS, 22, *header(4, 4)]
    for _line in range(4):
        tokens += [*torch.randint(24, 48, (4,), generator=chance).tolist(), EOL]
    tokens += [EOF, EOI, 21, 22, *header(12, 2)]
    second = len(tokens)
    for _line in range(12):
        tokens += [*torch.randint(24, 48, (2,), generator=chance).tolist(), EOL]
    tokens += [EOF, EOI, 21]
    with torch.inference_mode(), attach(model, policy=linear(), budget="15") as cache:
        watch = Watch(cache, 3, 1)
        for token in torch.tensor([tokens]).split(1, dim=1):
            model(token, **as_argument(cache))
    prefix = 2 + len(header(4, 4))
    layout = kvpolicy.SequenceLayout(prefix=prefix, pieces=((prefix, 5), (second, 3)))
    assert cache.policy_cache.layout == layout
    assert watch.decisions > 10
    assert cache.stats().peak_tokens == (prefix + 15, prefix + 15)


def test_an_image_in_the_prompt_is_prefix(model):
    """Emu3-Chat: an image, a question, and an answer in text, which is kept whole."""
    prompt = torch.tensor([[BOS, *header(2, 2), *[3] * 6, EOF, EOI, 21, 22]])
    with attach(model, policy=linear(), budget="15") as cache:
        generate(model, cache, prompts=prompt, prefix_allowed_tokens_fn=lambda *_: [21, 22])
    assert cache.policy_cache.layout is None
    assert cache.stats().evictions == (0, 0)


# -- bad input -------------------------------------------------------------------------------------


def test_a_budget_below_the_minimum_of_the_grid_that_is_drawn(model):
    words = r"budget=12 .* linear on RasterLayout\(rows=6, cols=4.*smallest .* works is 13"
    with (
        attach(model, policy=linear(), budget="12") as cache,
        pytest.raises(kvpolicy.BudgetError, match=words),
    ):
        generate(model, cache)


@pytest.mark.parametrize(
    "size", [[], [4 + 6], [4 + 6, 14], [4 + 6, 14, 22], [4 + 6, 14, 4], [14, 4 + 6]]
)
def test_sizes_that_are_no_sizes_are_refused(model, size):
    prompt = torch.tensor([[BOS, 22, BOI, *size, WRAPPER]])
    words = r"are no size such as 90\*90.*return_for_image_generation=True"
    with (
        attach(model, policy=linear(), budget="15") as cache,
        pytest.raises(kvpolicy.LayoutError, match=words),
    ):
        model(prompt, **as_argument(cache))
    with pytest.raises(kvpolicy.LayoutError, match=words):
        GridRule(model)(0, prompt[0])


def test_a_size_of_merged_tokens_is_read(model):
    prompt = torch.tensor([[BOS, 22, BOI, 15, 14, 4 + 3, WRAPPER]])
    with torch.inference_mode(), attach(model, policy=linear(), budget="15") as cache:
        model(prompt, **as_argument(cache))
        model(prompt[:, :1], **as_argument(cache))
    layout = cache.policy_cache.layout
    assert (layout.rows, layout.cols) == (12, 3)


def test_a_rule_without_a_size_is_refused(model):
    with pytest.raises(kvpolicy.LayoutError, match=r"no <\|image token\|> in row 3"):
        GridRule(model)(3, torch.tensor([BOS, 22]))


def test_prompts_of_other_sizes_beside_each_other_are_refused(model):
    prompts = torch.tensor([[BOS, 22, *header(6, 4)], [BOS, 22, *header(4, 6)]])
    with (
        attach(model, policy=linear(), budget="15") as cache,
        pytest.raises(kvpolicy.LayoutError, match="opens different images in the rows"),
    ):
        generate(model, cache, prompts=prompts)


def test_a_vocabulary_without_image_tokens_is_refused():
    model = tiny({name: token for name, token in NAMES.items() if name != "<|image token|>"})
    words = r"no <\|image token\|> in its config.vocabulary_map.*layout=AfterPrompt"
    with pytest.raises(kvpolicy.LayoutError, match=words), attach(model, budget=15):
        pass
    grid = kvpolicy.AfterPrompt(GRID.model_copy(update={"prefix": 0}))
    with attach(model, policy=linear(), budget=15, layout=grid):
        pass
