"""Janus-Pro: the real class at a tiny size, its own image generation, under a policy."""

from __future__ import annotations

import pytest
import torch
from support.image_loop import Watch, linear, sharpen

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.images.janus import GRID
from kvpolicy_adapters.transformers.cache_argument import as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

SIDE, PAD, BOS, BOI = 6, 0, 1, 3
#: `random` draws by absolute position, and `knorm` finds equal keys (the same image token again)
#: unequal by rounding, which padding changes.
BLIND_TO_PADDING = sorted(set(kvpolicy.available()) - {"full", "knorm", "random"})
SMALL = {
    "linear": {"anchors": 3},
    "linear2d": {"anchors": 3},
    "pyramid": {"window": 2, "interval": 3},
    "snapkv": {"window": 2, "interval": 3},
    "rkv": {"window": 2, "interval": 3},
    "ssd": {"window": 3},
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}


def tiny(**vision) -> transformers.JanusForConditionalGeneration:
    torch.manual_seed(0)
    config = transformers.JanusConfig(
        text_config=TEXT,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 4 * SIDE,
            "patch_size": 4,
            "mlp_ratio": 1.0,
            "projection_dim": 32,
            "num_image_tokens": SIDE * SIDE,
            "depth": 1,
        }
        | vision,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 40,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 1,
        },
    )
    model = transformers.JanusForConditionalGeneration(config).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": BOI}
    model.generation_config.bos_token_id = BOS
    model.generation_config.pad_token_id = PAD
    sharpen(model)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


#: Two prompts, the first padded on the left. In the unconditional half transformers replaces all
#: but the first and last token by padding that is attended to: the halves differ in their padding.
PROMPTS = torch.tensor([[PAD, PAD, BOS, 7, 9, BOI], [BOS, 5, 8, 6, 11, BOI]])


def draw(model, prompts=PROMPTS, cache=None, **options):
    settings = {"do_sample": False, "guidance_scale": 5.0, "generation_mode": "image"} | options
    if cache is not None:
        settings |= as_argument(cache)
    mask = (prompts != PAD).long()
    return model.generate(prompts, attention_mask=mask, **settings)


def own(model, prompts=PROMPTS, **options):
    """What the family's own cache gives: a static one, which its 5.17 fails to make."""
    try:
        return draw(model, prompts, **options)
    except TypeError as error:
        if "prefill_chunk_size" not in str(error):
            raise
        return draw(model, prompts, transformers.DynamicCache(), **options)


@pytest.mark.parametrize("name", kvpolicy.available())
def test_lossless_when_it_fits(model, name):
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    expected = own(model)
    torch.manual_seed(5)
    sampled = own(model, do_sample=True)
    with attach(model, policy=policy, budget="1/1") as cache:
        assert torch.equal(draw(model, cache=cache), expected)
        cache.reset()
        torch.manual_seed(5)
        assert torch.equal(draw(model, cache=cache, do_sample=True), sampled)
    assert cache.stats().evictions == (0, 0)


def test_the_family_and_the_prompt_make_the_layout(model):
    with attach(model, policy="h2o", budget="1/3") as cache:
        assert cache.policy_cache.layout is None
        draw(model, cache=cache)
    assert cache.policy_cache.layout == kvpolicy.RasterLayout(rows=SIDE, cols=SIDE, prefix=6)
    assert cache.stats().budgets == (12, 12)
    assert cache.stats().seen == 6 + SIDE * SIDE - 1  # the last token is not fed back


def test_the_released_grid():
    config = transformers.JanusConfig()
    assert (config.vision_config.num_image_tokens, config.vq_config.num_patches) == (576, 24)
    assert GRID.grid == kvpolicy.RasterLayout(rows=24, cols=24)


def step_logits(model, cache, tokens):
    """The conditional and unconditional logits of the real loop's model, teacher-forced."""
    doubled = torch.cat([PROMPTS, PROMPTS.masked_fill((PROMPTS > BOI) | (PROMPTS == 2), PAD)])
    mask = torch.cat([PROMPTS != PAD] * 2).long()
    embedded = model.get_input_embeddings()(doubled)
    logits = []
    for token in [None, *tokens.split(1, dim=1)]:
        if token is not None:
            embedded = model.prepare_embeddings_for_image_generation(torch.cat([token, token]))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = model.model.language_model(
            inputs_embeds=embedded, attention_mask=mask, **as_argument(cache), use_cache=True
        ).last_hidden_state[:, -1]
        logits.append(model.model.generation_head(hidden))
    return torch.stack(logits)


def test_logits_of_both_halves_equal_the_full_cache(model):
    tokens = own(model)[:, :-1]
    with torch.inference_mode(), attach(model, policy=linear(), budget="1/1") as cache:
        mine = step_logits(model, cache, tokens)
        full = step_logits(model, transformers.DynamicCache(), tokens)
    torch.testing.assert_close(mine, full, atol=1e-6, rtol=0)
    assert mine.shape[:2] == (SIDE * SIDE, 4)


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize(("anchors", "recent"), [(3, 1), (0, 0), (7, 1)])
def test_lines_are_right_in_the_real_loop(model, reclaim, anchors, recent):
    policy = linear(anchors, recent)
    with attach(model, policy=policy, budget="20", reclaim=reclaim) as cache:
        watch = Watch(cache, anchors, recent)
        tokens = draw(model, cache=cache)
    assert watch.decisions == 2 * ((SIDE * SIDE - 20 + SIDE - 1) // SIDE)
    assert watch.calls == 2 * SIDE * SIDE
    assert max(cache.stats().peak_tokens) <= 6 + 20
    assert not torch.equal(tokens, own(model)), "what was evicted must have mattered"
    layout = cache.policy_cache.layout
    assert len(watch.line_ends) == 2 * (SIDE - 1)  # the last line's last token is not fed back
    for _, line, positions in watch.line_ends:
        assert positions.shape[:2] == (4, 2)  # two prompts, conditional and unconditional
        rows, columns = layout.line(positions), layout.column(positions)
        for batch in range(4):
            for head in range(2):
                held = positions[batch, head] >= 6
                cells = set(
                    zip(
                        rows[batch, head][held].tolist(),
                        columns[batch, head][held].tolist(),
                        strict=True,
                    )
                )
                assert len(cells) == int(held.sum())
                whole = range(max(0, line - recent), line + 1)
                assert {(row, column) for row in whole for column in range(SIDE)} <= cells
                assert {(n // SIDE, n % SIDE) for n in range(min(anchors, line * SIDE))} <= cells
                assert max(cells) == (line, SIDE - 1)


@pytest.mark.parametrize("name", BLIND_TO_PADDING)
def test_padding_is_never_attended_to_and_changes_no_decision(model, name):
    """A prompt padded on the left draws and keeps what it draws and keeps alone."""
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    alone = PROMPTS[:1, 2:]
    results = []
    for prompts in (PROMPTS, alone):
        with attach(model, policy=policy, budget="20") as cache:
            tokens = draw(model, prompts, cache)
            prefix = prompts.shape[1]
            half = len(prompts)
            held = [cache.positions(n)[[0, half]] for n in range(2)]
        held = [(p - prefix).masked_fill(p < prefix, -1).sort(-1).values for p in held]
        evictable = zip(held, cache.stats().budgets, strict=True)
        results.append((tokens[0], *(p[..., -budget:] for p, budget in evictable)))
    for padded, bare in zip(*results, strict=True):
        assert torch.equal(padded, bare)


@pytest.mark.parametrize("name", ["linear", "h2o"])
def test_halves_and_neighbours_decide_by_themselves(model, name):
    """Another prompt beside it, and another half, leave a row's cache as it was."""
    policy = kvpolicy.create(name, **SMALL.get(name, {}))
    tokens = own(model)[:, :-1]
    held = []
    for other in (tokens[1:], (tokens[1:] + 7) % 40):
        with torch.inference_mode(), attach(model, policy=policy, budget="20") as cache:
            step_logits(model, cache, torch.cat([tokens[:1], other]))
            held.append(torch.stack([cache.positions(n) for n in range(2)]))
    assert torch.equal(held[0][:, [0, 2]], held[1][:, [0, 2]])
    assert not torch.equal(held[0][:, [1, 3]], held[1][:, [1, 3]])


def test_several_images_for_one_prompt(model):
    options = {"num_return_sequences": 3, "do_sample": True}
    torch.manual_seed(3)
    expected = own(model, **options)
    with attach(model, policy=linear(), budget="1/1") as cache:
        torch.manual_seed(3)
        out = draw(model, cache=cache, **options)
    assert out.shape == (6, SIDE * SIDE)
    assert torch.equal(out, expected)


def test_what_is_drawn_decodes_to_pixels(model):
    with attach(model, policy=linear(), budget="1/2") as cache:
        pixels = model.decode_image_tokens(draw(model, cache=cache))
    assert pixels.shape == (2, 2 * SIDE, 2 * SIDE, 3)


# -- driven as the original repository does --------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(1)
    fields = {name: value for name, value in TEXT.items() if name != "model_type"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    sharpen(model)
    return model


def drive(llama, cache, tokens: int, scale: float = 5.0):
    """Image tokens drawn from a Llama with embeddings: conditional and unconditional rows in turn,
    padding in the unconditional ones, no attention mask. Heads are random, as weights are."""
    chance = torch.Generator().manual_seed(2)
    head = torch.randn(32, 40, generator=chance)
    table = torch.randn(40, 32, generator=chance) * 0.02
    prompts = torch.stack([PROMPTS[1], PROMPTS[1].masked_fill(PROMPTS[1] > BOI, PAD)] * 2)
    embedded = llama.get_input_embeddings()(prompts)
    drawn = []
    for _ in range(tokens):
        output = llama.model(inputs_embeds=embedded, use_cache=True, **as_argument(cache))
        logits = output.last_hidden_state[:, -1] @ head
        guided = logits[1::2] + scale * (logits[0::2] - logits[1::2])
        token = guided.argmax(-1)
        drawn.append(token)
        embedded = table[token].repeat_interleave(2, dim=0).unsqueeze(1)
    return torch.stack(drawn, dim=1)


def test_a_llama_driven_with_embeddings(llama):
    grid = kvpolicy.AfterPrompt(kvpolicy.RasterLayout(rows=SIDE, cols=SIDE))
    with torch.inference_mode():
        expected = drive(llama, transformers.DynamicCache(), SIDE * SIDE)
        with attach(llama, policy=linear(), budget="1/1", layout=grid) as cache:
            assert torch.equal(drive(llama, cache, SIDE * SIDE), expected)
        with attach(llama, policy=linear(), budget="20", layout=grid) as cache:
            watch = Watch(cache, 3, 1)
            assert not torch.equal(drive(llama, cache, SIDE * SIDE), expected)
    assert watch.decisions > 0
    assert cache.policy_cache.layout == kvpolicy.RasterLayout(rows=SIDE, cols=SIDE, prefix=6)


# -- bad input -------------------------------------------------------------------------------------


def test_a_budget_below_the_minimum_of_this_grid(model):
    words = r"too few for linear on RasterLayout\(rows=6.*smallest budget that works is 15"
    with pytest.raises(kvpolicy.BudgetError, match=words), attach(model, policy=linear(), budget=9):
        pass


def test_a_grid_that_does_not_divide_the_tokens():
    model = tiny(num_image_tokens=35)
    words = r"num_image_tokens=35 in lines of num_patches=6.*layout=AfterPrompt"
    with pytest.raises(kvpolicy.LayoutError, match=words), attach(model, budget=20):
        pass
    with attach(model, policy="h2o", budget=20, layout=GRID):
        pass


def test_another_batch_needs_a_reset(model):
    with attach(model, policy="h2o", budget=20) as cache:
        draw(model, cache=cache)
        with pytest.raises(kvpolicy.KVPolicyError, match=r"reset\(\)"):
            draw(model, PROMPTS[:1], cache)
        cache.reset()
        draw(model, PROMPTS[:1], cache)
