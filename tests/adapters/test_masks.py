"""Masks that are not causal: what the model lets tokens see is what they see under a policy."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import tiny_models

import kvpolicy
import kvpolicy_adapters
from kvpolicy_adapters import attach
from kvpolicy_adapters.transformers.cache_argument import as_argument

LENGTH, IMAGE = 30, 61


def room(model, name="h2o", budget=40):
    layout = kvpolicy.TextLayout(length=40)
    return attach(model, policy=name, budget=budget, layout=layout)


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    order = torch.rand(batch, 59, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return 1 + order[:, :length]


def causal(length: int = LENGTH) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def prefix_lm() -> torch.Tensor:
    mask = causal().clone()
    mask[..., :9, :9] = True
    return mask


def packed() -> torch.Tensor:
    """Three sequences in one row, none of which sees another."""
    mask = causal().clone()
    for first, after in ((0, 8), (8, 19), (19, LENGTH)):
        mask[..., first:after, :first] = False
    return mask


def tree() -> torch.Tensor:
    """Three branches behind a trunk, which see the trunk and themselves."""
    mask = causal().clone()
    for first, after in ((12, 18), (18, 24), (24, LENGTH)):
        mask[..., first:after, 12:first] = False
    return mask


def blocks() -> torch.Tensor:
    """Two groups that see themselves in both directions, with text before and behind each."""
    mask = causal().clone()
    mask[..., 4:10, 4:10] = True
    mask[..., 15:23, 15:23] = True
    return mask


MASKS = {"a prefix": prefix_lm, "packed": packed, "a tree": tree, "blocks": blocks}


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


@pytest.mark.parametrize("form", [lambda m: m, additive], ids=["bool", "additive"])
@pytest.mark.parametrize("name", ["full", "h2o", "linear", "streaming_llm"])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_of_the_users_own(model, kind, name, form):
    mask = MASKS[kind]().expand(2, -1, -1, -1)
    places = torch.arange(LENGTH).expand(2, -1)
    with torch.inference_mode():
        expected = model(tokens(), attention_mask=form(mask), position_ids=places).logits
        plain = model(tokens(), position_ids=places).logits
        assert (expected - plain).abs().max() > 0.05, "the mask must matter"
        with room(model, kvpolicy.create(name)) as cache:
            given = model(
                tokens(), attention_mask=form(mask), position_ids=places, **as_argument(cache)
            ).logits
            assert sum(cache.stats().evictions) == 0
            # And behind it, a token that sees everything.
            own = transformers.DynamicCache(config=model.config)
            model(tokens(), attention_mask=form(mask), position_ids=places, **as_argument(own))
            more = tokens()[:, :1]
            behind = model(more, **as_argument(own)).logits
            behind_ours = model(more, **as_argument(cache)).logits
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(behind_ours, behind, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [10, 15])
def test_a_mask_that_comes_in_chunks(model, size):
    """Chunks that split no group: each sees what the whole mask says."""
    mask = blocks() if size == 15 else prefix_lm()
    places = torch.arange(LENGTH).expand(2, -1)
    with torch.inference_mode():
        expected = model(
            tokens(), attention_mask=mask.expand(2, -1, -1, -1), position_ids=places
        ).logits
        with room(model) as cache:
            parts = [
                model(
                    tokens()[:, at : at + size],
                    attention_mask=mask[:, :, at : at + size, : at + size].expand(2, -1, -1, -1),
                    position_ids=places[:, at : at + size],
                    **as_argument(cache),
                ).logits
                for at in range(0, LENGTH, size)
            ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


def gemma3():
    torch.manual_seed(0)
    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=8,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=62, eoi_token_index=63,
    )  # fmt: skip
    made = transformers.Gemma3ForConditionalGeneration(config).eval()
    for layer in made.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 12
        layer.self_attn.k_proj.weight.data *= 12
    return made


@pytest.mark.parametrize("budget", [40, 14], ids=["windows left alone", "windows under it"])
def test_an_image_in_the_prompt_of_gemma_3_sees_itself(budget):
    """Its tokens attend in both directions, text behind and before it does not."""
    made = gemma3()
    ids = tokens(2, 12)
    ids[:, 3:7] = IMAGE
    inputs = {
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)),
    }
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0} | {
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    if budget == 14:
        made.config.text_config.sliding_window = 64  # longer than the text: under the policy
    with torch.inference_mode():
        expected = made.generate(ids, **inputs, **options)
        blind = made(ids, attention_mask=inputs["attention_mask"], **{
            "pixel_values": inputs["pixel_values"], "token_type_ids": torch.zeros_like(ids),
        }).logits  # fmt: skip
        first = made(ids, **inputs).logits
        assert (first - blind).abs().max() > 0.02, "that the image sees itself must matter"
        with room(made, "h2o", 40) as cache:
            given = made.generate(ids, **inputs, **options, **as_argument(cache))
    for mine, theirs in zip(given.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(given.sequences, expected.sequences)
    with torch.inference_mode(), room(made, "h2o", budget) as cache:
        made.generate(ids, **inputs, **options, **as_argument(cache))
        for layer in range(4):
            if layer not in cache.stats().left_alone:
                assert cache.stats().peak_tokens[layer] <= budget


def test_a_mask_of_each_query_head(model):
    """As Doge's: what none of a KV head's queries sees is hidden, the rest head by head."""
    length = 12
    generator = torch.Generator().manual_seed(5)
    mask = causal(length).expand(2, 4, -1, -1).clone()
    mask &= torch.rand(2, 4, length, length, generator=generator) > 0.3
    mask |= torch.eye(length, dtype=torch.bool)
    places = torch.arange(length).expand(2, -1)
    ids = tokens(2, length)
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, position_ids=places).logits
        with room(model) as cache:
            given = model(
                ids, attention_mask=mask, position_ids=places, **as_argument(cache)
            ).logits
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_a_tensor_that_is_not_known_is_refused(model):
    """It might be what Inkling 2 gives its attention: sinks that differ from token to token."""
    with (
        torch.inference_mode(),
        room(model) as cache,
        pytest.raises(kvpolicy.ModelError, match="gives its attention sinks, which kvpolicy does"),
    ):
        model(tokens(), sinks=torch.zeros(2, 4, LENGTH, 1), **as_argument(cache))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_that_is_made_of_cached_values_is_refused(compiled):
    """Doge's: under a policy its cache gives the new ones back."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    made = transformers.DogeForCausalLM(config).eval()
    with torch.inference_mode(), room(made) as cache:
        made(tokens(), **as_argument(cache))
        if not compiled:
            with pytest.raises(
                kvpolicy.ModelError, match=r"makes the mask of what its cache gives"
            ):
                made(tokens()[:, :1], **as_argument(cache))
            return
        with (
            pytest.warns(RuntimeWarning, match="compiled no step"),
            kvpolicy_adapters.compile_decode(made, cache, backend="eager"),
            pytest.raises(Exception, match="in a way of its own, which a compiled"),
        ):
            made(tokens()[:, :1], **as_argument(cache))
