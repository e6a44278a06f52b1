"""Versions of transformers: the name of the cache's argument, and a word about newer ones."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from support import tiny_models

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.transformers import cache_argument, versions

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def generate(model, **options):
    return model.generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False, pad_token_id=0, **options
    )


def test_the_argument_has_the_name_that_the_models_take():
    taken = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    assert cache_argument.CACHE_ARGUMENT in taken
    other = {"cache": "past_key_values", "past_key_values": "cache"}
    assert other[cache_argument.CACHE_ARGUMENT] not in taken


def test_the_spelling_that_we_tell_users_draws_no_warning(capfd):
    model = tiny_models.llama()
    with attach(model, policy="h2o", budget=4, layout=kvpolicy.TextLayout()) as cache:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, **cache.as_argument)
        assert cache.stats().seen == 7
    assert "deprecated" not in capfd.readouterr().err


def test_a_cache_is_found_by_what_it_is():
    cache, other = transformers.DynamicCache(), transformers.DynamicCache()
    assert cache_argument.brings(cache, (1, cache), {})
    assert cache_argument.brings(cache, (), {"whatever": cache})
    assert not cache_argument.brings(cache, (other,), {"cache": other})
    assert cache_argument.given_cache((None, 1), {"x": other}) is other
    assert cache_argument.given_cache((), {"x": "cache"}) is None
    with pytest.raises(kvpolicy.ParameterError, match="give one cache"):
        cache_argument.either(cache, other)


def test_a_newer_version_is_said_once(monkeypatch):
    model = tiny_models.llama()
    monkeypatch.setattr(versions, "NEWEST_TESTED", "5.0.0")
    monkeypatch.setattr(versions, "_said", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with attach(model, policy="h2o", budget=4, layout=kvpolicy.TextLayout()):
                pass
    (said,) = caught
    assert said.filename == __file__
    message = str(said.message)
    assert "\n" not in message
    assert f"up to 5.0.0, and this is {transformers.__version__}" in message


def test_a_tested_version_is_met_in_silence(monkeypatch):
    model = tiny_models.llama()
    monkeypatch.setattr(versions, "NEWEST_TESTED", transformers.__version__)
    monkeypatch.setattr(versions, "_said", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, policy="h2o", budget=4, layout=kvpolicy.TextLayout()):
            pass


def test_the_newest_tested_version_is_the_pinned_one():
    (pinned,) = re.findall(r"^transformers==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned == versions.NEWEST_TESTED
