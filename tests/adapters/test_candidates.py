"""Assisted generation, prompt lookup and early exit of transformers, on a cache that evicts."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from support import tiny_models

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.transformers.cache_argument import as_argument

NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
TEXT = kvpolicy.TextLayout(sinks=1)
#: Whatever brings candidates; the model itself is the best assistant there is.
WAYS = {
    "another model": lambda model: {"assistant_model": tiny_models.llama(seed=2)},
    "the model itself": lambda model: {"assistant_model": model},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 4},
    "early exit": lambda model: {"assistant_early_exit": 1},
}


def prompt() -> torch.Tensor:
    """Some tokens, of which the first come once more: something to look up."""
    ids = torch.randint(1, tiny_models.VOCAB, (1, 14), generator=torch.Generator().manual_seed(3))
    return torch.cat([ids, ids[:, :10]], dim=1)


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


@pytest.mark.parametrize("name", sorted(set(kvpolicy.available()) - {"knorm"}))
def test_candidates_change_nothing_but_the_number_of_passes(model, name):
    """Greedy output is that of the same cache one by one, and so is what is evicted."""
    policy = tiny_models.policy(name)
    budget = 60 if name == "full" else max(12, policy.min_budget(TEXT))
    with attach(model, policy=policy, budget=budget, layout=TEXT) as cache:
        expected = model.generate(prompt(), **GREEDY, **as_argument(cache))
        alone = cache.stats()
        for way in WAYS if name in ("h2o", "linear") else ("the model itself",):
            cache.reset()
            options = WAYS[way](model)
            found = model.generate(prompt(), **GREEDY, **options, **as_argument(cache))
            assert torch.equal(found, expected), way
            stats = cache.stats()
            assert (stats.seen, stats.evictions) == (alone.seen, alone.evictions)
            assert stats.peak_tokens == alone.peak_tokens
            # The first token comes from the prompt's pass, each other was staged.
            assert stats.accepted == NEW - 1
            assert 0 < stats.acceptance <= 1
            assert stats.passes < (NEW - 2 if way == "the model itself" else NEW + 1)
            assert cache.staged == 0
            assert not cache.policy_cache.staging


def test_short_keys_where_no_two_tokens_tie():
    """``knorm``, on a model whose keys know their position: a token that repeats ties otherwise."""
    model = tiny_models.gpt2()
    with attach(model, policy="knorm", budget=12, layout=TEXT) as cache:
        expected = model.generate(prompt(), **GREEDY, **as_argument(cache))
        for way in ("the model itself", "prompt lookup"):
            cache.reset()
            found = model.generate(prompt(), **GREEDY, **WAYS[way](model), **as_argument(cache))
            assert torch.equal(found, expected)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="windows of transformers 5.17, left alone, end candidates with an error of their masks",
)
def test_layers_that_are_left_alone_take_tokens_back(monkeypatch):
    """A model whose windows are smaller than the budget in every other layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=tiny_models.VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            eos_token_id=None,
        )
    ).eval()
    with attach(model, policy="h2o", budget=12, layout=TEXT) as cache:
        assert cache.stats().left_alone == (0, 2)
        expected = model.generate(prompt(), **GREEDY, **as_argument(cache))
        cache.reset()
        options = {"prompt_lookup_num_tokens": 4}
        found = model.generate(prompt(), **GREEDY, **options, **as_argument(cache))
        assert torch.equal(found, expected)
        assert {layer.get_seq_length() for layer in cache.layers} == {prompt().shape[1] + NEW - 1}
        assert not cache.layers[0].record_past
        monkeypatch.setattr(type(cache.layers[0]), "is_croppable", False)
        refused = pytest.raises(kvpolicy.CacheStateError, match="can't take tokens back")
        with refused, cache.stage(3):
            pass
        assert not cache.policy_cache.staging


def test_sampling_with_candidates(model):
    """The same random numbers give the same tokens as a cache that evicts nothing gives."""
    options = {"prompt_lookup_num_tokens": 4} | GREEDY | {"do_sample": True}
    with attach(model, policy="full", layout=kvpolicy.TextLayout(length=99)) as cache:
        torch.manual_seed(0)
        found = model.generate(prompt(), **options, **as_argument(cache))
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(prompt(), **options))


def test_crop(model):
    ids = prompt()
    with attach(model, policy="h2o", budget=12, layout=TEXT) as cache, torch.no_grad():
        model(ids, **as_argument(cache))
        assert not cache.is_croppable
        cache.crop(0)
        with pytest.raises(kvpolicy.CacheStateError, match="inside of"):
            cache.crop(-1)
        with pytest.raises(kvpolicy.CacheStateError, match="inside of"):
            cache.activate_past_recording()
        with cache.stage(4):
            assert cache.is_croppable
            cache.activate_past_recording()
            model(ids[:, :3], **as_argument(cache))
            with pytest.raises(kvpolicy.CacheStateError, match=r"take back 4 of 27 tokens, but 3"):
                cache.crop(-4)
            cache.crop(-2)
            assert (cache.get_seq_length(), cache.staged) == (25, 0)
            model(ids[:, :3], **as_argument(cache))
            cache.crop(26)  # as older versions say it: what is left
            assert cache.get_seq_length() == 26


REFUSED = {
    "a used cache": ({}, "brings the whole sequence anew"),
    "a prompt of embeddings": ({"embeds": True}, "pass it as input_ids"),
    "drafts by layers of the model": ({"use_mtp": True}, "was not tried"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_can_not_be_served_says_so(model, way):
    options, said = REFUSED[way]
    options = dict(options)
    with attach(model, policy="h2o", budget=12, layout=TEXT) as cache:
        given = {"input_ids": prompt()}
        if way == "a used cache":
            model.generate(prompt(), **GREEDY, **as_argument(cache))
        if options.pop("embeds", False):
            given = {"inputs_embeds": model.get_input_embeddings()(prompt())}
        if not options:
            options = {"prompt_lookup_num_tokens": 3}
        with pytest.raises(kvpolicy.KVPolicyError, match=said):
            model.generate(**given, **options, **GREEDY, **as_argument(cache))
