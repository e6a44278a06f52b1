"""Models that come wrapped: what is inside is attached, or the remedy is named."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from torch import nn

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.transformers.cache_argument import as_argument

BUDGET, NEW = 8, 14
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompt() -> torch.Tensor:
    return 1 + torch.rand(2, 60, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :6]


def attached(wrapped):
    return attach(wrapped, policy="h2o", budget=BUDGET, layout=kvpolicy.TextLayout(sinks=1))


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture
def expected(model):
    with attached(model) as cache:
        return model.generate(prompt(), **GREEDY, **as_argument(cache))


def test_a_compiled_module(model, expected):
    compiled = torch.compile(model, backend="eager")
    with attached(compiled) as cache:
        given = compiled.generate(prompt(), **GREEDY, **as_argument(cache))
    assert torch.equal(given, expected)
    assert cache.stats().peak_tokens == (1 + BUDGET,) * 3


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_parallel_modules(model, expected, wrap):
    wrapped = wrap(model)
    tokens = prompt()
    with torch.inference_mode(), attached(wrapped) as cache:
        while tokens.shape[1] < expected.shape[1]:
            new = tokens[:, cache.get_seq_length() :]
            logits = wrapped.module(new, **as_argument(cache)).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, expected)
    assert cache.stats().evictions == (cache.stats().seen - 1 - BUDGET,) * 3


def test_a_model_that_accelerate_prepared(model, expected):
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(model)
    with attached(prepared) as cache:
        given = prepared.generate(prompt(), **GREEDY, **as_argument(cache))
    assert torch.equal(given, expected)


class Pipeline:
    """As transformers' own: no module, but it holds one."""

    def __init__(self, model):
        self.model = model


def test_a_pipeline(model, expected):
    pipeline = Pipeline(model)
    with attached(pipeline) as cache:
        given = pipeline.model.generate(prompt(), **GREEDY, **as_argument(cache))
    assert torch.equal(given, expected)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT's models are served, but not asked for")


def test_lora(peft, model):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    tuned = peft.get_peft_model(model, config).eval()
    plain = tuned.generate(input_ids=prompt(), **GREEDY)
    with attach(tuned, policy="h2o", budget=40, layout=kvpolicy.TextLayout(length=40)) as cache:
        given = tuned.generate(input_ids=prompt(), **GREEDY, **as_argument(cache))
    assert torch.equal(given, plain)
    with attached(tuned) as cache:
        tuned.generate(input_ids=prompt(), **GREEDY, **as_argument(cache))
    assert cache.stats().seen == 6 + NEW - 1
    assert cache.stats().peak_tokens == (1 + BUDGET,) * 3


def test_prefix_tuning_is_refused_by_name(peft, model):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config)
    with pytest.raises(kvpolicy.ModelError, match="prefix tuning"), attached(tuned):
        pass


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.language = model


def test_the_remedy_is_named(model):
    with (
        pytest.raises(kvpolicy.ParameterError, match=r"is a Holder.*attach.*model\.language"),
        attached(Holder(model)),
    ):
        pass
