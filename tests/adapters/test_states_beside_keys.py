"""Layers that keep a state beside keys and values: the state stays, keys are evicted."""

from __future__ import annotations

import copy

import pytest
import torch
from support import slow_reference

import kvpolicy
from kvpolicy_adapters import attach, compile_decode
from kvpolicy_adapters.evaluation.sweep.tiny import build
from kvpolicy_adapters.transformers.cache_argument import as_argument

TEXT = kvpolicy.TextLayout(sinks=1, length=64)
BUDGET = 7
NAMES = ["FalconH1ForCausalLM", "Zamba2ForCausalLM"]


def room(model, budget=60, policy="h2o"):
    return attach(model, policy=policy, budget=budget, layout=TEXT)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return build(request.param)


def attention(model) -> list[torch.nn.Module]:
    """One module a layer: layers may share one, as Zamba's do."""
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def test_what_was_evicted_is_gone_and_the_state_is_not(model):
    modules = attention(model)
    with room(model, BUDGET) as cache:
        parts = slow_reference.texts(30).split([6, *[1] * 24], 1)
        given, held = slow_reference.under_policy(model, cache, parts)
        stats = cache.stats()
    assert len(modules) == len(held[0])
    evicting = [n for n in range(len(cache.layers)) if n not in stats.left_alone]
    assert [stats.peak_tokens[n] for n in evicting] == [1 + BUDGET] * len(evicting)
    slow_reference.check(model, modules, parts, given, held)


def test_beams(model):
    options = {"num_beams": 3, "max_new_tokens": 10, "pad_token_id": 0, "do_sample": False}
    expected = model.generate(slow_reference.texts(9), **options)
    with room(model) as cache:
        given = model.generate(slow_reference.texts(9), **options, **as_argument(cache))
    assert torch.equal(given, expected)


def test_a_copy_has_a_state_of_its_own(model):
    ids = slow_reference.texts(30)
    with torch.inference_mode(), room(model, BUDGET) as cache:
        model(ids[:, :20], **as_argument(cache))
        copied = copy.deepcopy(cache)
        expected = [model(token, **as_argument(cache)).logits for token in ids[:, 20:].split(1, 1)]
        given = [model(token, **as_argument(copied)).logits for token in ids[:, 20:].split(1, 1)]
    assert torch.equal(torch.cat(given), torch.cat(expected))


def test_rows_that_are_chosen_and_repeated_bring_their_state(model):
    ids = slow_reference.texts(30)
    with torch.inference_mode(), room(model, BUDGET) as cache:
        model(ids[:, :20], **as_argument(cache))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 3, 1]))
        rows = ids[[1, 1, 0], 20:]
        given = [model(token, **as_argument(cache)).logits for token in rows.split(1, 1)]
    with torch.inference_mode(), room(model, BUDGET) as cache:
        model(ids[:, :20], **as_argument(cache))
        expected = [
            model(token, **as_argument(cache)).logits[[1, 1, 0]]
            for token in ids[:, 20:].split(1, 1)
        ]
    torch.testing.assert_close(torch.cat(given), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_cache_that_was_reset_is_as_new(model):
    ids = slow_reference.texts(20)
    results = []
    with torch.inference_mode(), room(model, BUDGET) as cache:
        for _ in range(2):
            results.append(
                [model(p, **as_argument(cache)).logits for p in ids.split([6, *[1] * 14], 1)]
            )
            cache.reset()
    assert torch.equal(torch.cat(results[0], 1), torch.cat(results[1], 1))


def test_what_a_state_does_not_allow_is_refused(model):
    with (
        room(model) as cache,
        pytest.raises(kvpolicy.ParameterError, match="keep a state besides"),
        compile_decode(model, cache),
    ):
        pass
    with room(model) as cache:
        with (
            pytest.raises(kvpolicy.CacheStateError, match="can't take tokens back"),
            cache.stage(3),
        ):
            pass
        with pytest.raises(kvpolicy.CacheStateError, match="can't take tokens back"):
            model.generate(
                slow_reference.texts(9, 1), prompt_lookup_num_tokens=2, **as_argument(cache)
            )
