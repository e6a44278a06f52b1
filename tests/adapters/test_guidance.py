"""The second cache of guidance follows the first: beams, several sequences, another prompt."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import tiny_models

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.images.guidance import Guidance
from kvpolicy_adapters.transformers.cache_argument import as_argument

SCALE, NEW = 3.0, 12
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams that return several": {"num_beams": 4, "num_return_sequences": 2},
    "several sequences": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
}


def tokens(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    order = torch.rand(rows, 59, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return 1 + order[:, :length]


class WithoutCaches(transformers.LogitsProcessor):
    """Guidance from the whole sequence each time: no cache that could lag behind."""

    def __init__(self, model, negative, mask, length):
        self.model, self.negative, self.mask, self.length = model, negative, mask, length

    def __call__(self, input_ids, scores):
        each = len(input_ids) // len(self.negative)
        behind = input_ids[:, self.length :]
        whole = torch.cat([self.negative.repeat_interleave(each, 0), behind], dim=1)
        mask = torch.cat([self.mask.repeat_interleave(each, 0), torch.ones_like(behind)], dim=1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(whole, attention_mask=mask, position_ids=places, use_cache=False)
        unconditional = logits.logits[:, -1]
        return unconditional + SCALE * (scores - unconditional)


def generate(model, prompt, guide, **options):
    torch.manual_seed(9)
    processors = transformers.LogitsProcessorList([guide])
    mask = torch.ones_like(prompt)
    return model.generate(
        prompt, attention_mask=mask, logits_processor=processors, **OPTIONS | options
    )


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


def caches(model):
    layout = kvpolicy.TextLayout(length=80)
    return [attach(model, policy="h2o", budget=80, layout=layout) for _ in range(2)]


@pytest.mark.parametrize(("rows", "length", "padding"), [(2, 5, 0), (2, 9, 2), (1, 3, 0)])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_it_would_be_without_caches(model, way, rows, length, padding):
    prompt, negative = tokens(2, 5), tokens(rows, length, seed=8)
    mask = torch.ones_like(negative)
    mask[0, :padding] = 0
    expected = generate(model, prompt, WithoutCaches(model, negative, mask, 5), **WAYS[way])
    assert not torch.equal(expected, model.generate(prompt, **OPTIONS | WAYS[way]))
    first, second = caches(model)
    with first as cache, second as other:
        guide = Guidance(SCALE, model, other, negative, mask)
        given = generate(model, prompt, guide, **WAYS[way], **as_argument(cache))
    assert torch.equal(given, expected)


def test_one_object_for_prompt_after_prompt(model):
    """Of other and of the same lengths, and the same prompt again."""
    negative = tokens(1, 4, seed=8)
    mask = torch.ones_like(negative)
    first, second = caches(model)
    with first as cache, second as other:
        guide = Guidance(SCALE, model, other, negative[0])
        for length, seed in ((5, 1), (5, 2), (7, 1), (5, 1), (6, 1)):
            prompt = tokens(2, length, seed)
            expected = generate(model, prompt, WithoutCaches(model, negative, mask, length))
            cache.reset()
            given = generate(model, prompt, guide, **as_argument(cache))
            assert torch.equal(given, expected), (length, seed)


@pytest.mark.parametrize(
    ("negative", "mask", "said"),
    [
        (torch.ones(2, 3), None, "float32"),
        (torch.ones(2, 3, 4, dtype=torch.int64), None, "expected ids"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 3), "mask is"),
    ],
)
def test_what_is_no_prompt_is_refused(model, negative, mask, said):
    first, _ = caches(model)
    with first as cache, pytest.raises(kvpolicy.ShapeError, match=said):
        Guidance(SCALE, model, cache, negative, mask)


def test_rows_that_do_not_divide_are_refused(model):
    first, second = caches(model)
    with (
        first as cache,
        second as other,
        pytest.raises(kvpolicy.ShapeError, match=r"3 rows, which don't divide the 2"),
    ):
        generate(
            model, tokens(2, 5), Guidance(SCALE, model, other, tokens(3, 4)), **as_argument(cache)
        )
