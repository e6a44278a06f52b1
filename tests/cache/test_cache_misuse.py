"""Caches in the wrong place: each is an error that says what to do, and the right use goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from support import tiny_models

import kvpolicy
import kvpolicy_adapters

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

TEXT = kvpolicy.TextLayout(sinks=1)


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


def attach(model, policy="h2o", budget=9, layout=TEXT):
    return kvpolicy_adapters.attach(
        model, policy=tiny_models.policy(policy), budget=budget, layout=layout
    )


def generate(model, cache, batch=2, **options):
    tokens = torch.arange(1, 1 + 5 * batch).view(batch, 5)
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **cache.as_argument,
        max_new_tokens=16,
        do_sample=False,
        **options,
    )


OTHERS = {
    "same shapes": lambda model: tiny_models.llama(seed=2),
    "a copy": copy.deepcopy,
    "one configuration": lambda model: transformers.LlamaForCausalLM(model.config).eval(),
    "other heads": lambda model: tiny_models.llama(kv_heads=1),
    "other head dim": lambda model: tiny_models.llama(head_dim=16),
    "another family": lambda model: tiny_models.gpt2(),
}


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "not attached"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_of_another_model_is_refused(model, other, attached):
    with attach(model) as cache:
        alone = generate(model, cache)
    wrong = OTHERS[other](model)
    with attach(model) as cache:
        if attached:
            with (
                attach(wrong),
                pytest.raises(
                    kvpolicy.CacheStateError,
                    match=r"made for another LlamaForCausalLM object.*attach\(\) each model",
                ),
            ):
                generate(wrong, cache)
        else:
            # A model that shares the configuration runs our attention function, and is known there.
            known = wrong.config is model.config
            error = kvpolicy.CacheStateError if known else kvpolicy.ModelError
            words = "made for another" if known else r"LlamaForCausalLM that attach\(\) was given"
            with pytest.raises(error, match=words):
                generate(wrong, cache)
        assert cache.get_seq_length() == 0, "nothing was taken in"
        assert torch.equal(generate(model, cache), alone), "and the right model may go on"


def test_parts_of_the_model_are_the_model(model):
    """A causal model and the model inside it have the same attention."""
    tokens = torch.arange(1, 11).view(2, 5)
    with torch.inference_mode(), attach(model) as cache:
        model.model(tokens, **cache.as_argument)
        model(tokens, **cache.as_argument)
    with torch.inference_mode(), attach(model.model) as cache:
        model(tokens, **cache.as_argument)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("policy", ["h2o", "streaming_llm"])
def test_another_batch_midway_is_refused_and_the_first_goes_on(model, policy):
    tokens = torch.arange(1, 41).view(2, 20)
    with torch.inference_mode(), attach(model, policy) as cache:
        expected = [model(part, **cache.as_argument).logits for part in tokens.split(10, dim=1)]
    with torch.inference_mode(), attach(model, policy) as cache:
        model(tokens[:, :10], **cache.as_argument)
        with pytest.raises(
            kvpolicy.CacheStateError, match=r"from 2 to 3 after 10 tokens.*reset\(\) to start a new"
        ):
            model(tokens[:1].expand(3, -1)[:, :10], **cache.as_argument)
        logits = model(tokens[:, 10:], **cache.as_argument).logits
        torch.testing.assert_close(logits, expected[1])
        cache.reset()
        generate(model, cache, batch=3)


def test_a_new_sequence_in_a_used_cache_is_told_to_reset_it(model):
    with attach(model) as cache:
        expected = generate(model, cache)
        with pytest.raises(kvpolicy.CacheStateError, match=r"seen 20 tokens.*reset\(\) the cache"):
            generate(model, cache)
        cache.reset()
        assert torch.equal(generate(model, cache), expected)


def test_a_cache_is_done_when_its_block_is(model):
    """Also where the block ended by an error, and while another block is open."""
    with pytest.raises(RuntimeError, match="boom"), attach(model) as cache:
        generate(model, cache)
        raise RuntimeError("boom")
    words = r"block has ended; attach the model again"
    tokens = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(kvpolicy.CacheStateError, match=words):
        model(tokens, **cache.as_argument)
    with attach(model), pytest.raises(kvpolicy.CacheStateError, match=words):
        model(tokens, **cache.as_argument)
    assert cache.stats().seen == 20, "what it was can still be asked"
    assert cache.positions(0).shape == (2, 2, 10)


def test_a_budget_below_the_policys_minimum_is_refused_before_the_model_is_touched(model):
    before = model.config._attn_implementation
    for layout, least in (
        (kvpolicy.RasterLayout(rows=6, cols=5, prefix=1), 13),
        (kvpolicy.RasterLayout(rows=4, cols=7, line_break=1), 19),
    ):
        words = rf"budget={least - 1} .*linear on RasterLayout.*budget that works is {least}$"
        with (
            pytest.raises(kvpolicy.BudgetError, match=words),
            attach(model, "linear", least - 1, layout),
        ):
            pass
        with attach(model, "linear", least, layout) as cache:
            assert cache.stats().budgets == (least,) * 3
        assert model.config._attn_implementation == before
