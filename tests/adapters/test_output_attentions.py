"""output_attentions: weights by position, evicted tokens included, where they are asked for."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.turns import in_turn

import kvpolicy
import kvpolicy_adapters
from kvpolicy_adapters.transformers.cache_argument import as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

IMAGE = kvpolicy.RasterLayout(rows=6, cols=5, prefix=6)
TEXT = kvpolicy.TextLayout(sinks=1, length=36, line_length=5)
EVICTING = sorted(set(kvpolicy.available()) - {"full"})


def tokens(length: int = 36) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 1 + torch.rand(2, 60, generator=generator).argsort(-1)[:, :length]


def attach(model, layout, name="h2o", budget=13, **options):
    return kvpolicy_adapters.attach(
        model, policy=tiny_models.policy(name), budget=budget, layout=layout, **options
    )


def attentions(model, cache, parts, **options) -> list[list[torch.Tensor]]:
    """Of each call, one tensor a layer."""
    with torch.inference_mode():
        return [
            model(part, **as_argument(cache), output_attentions=True, **options).attentions
            for part in parts
        ]


@pytest.mark.parametrize("layout", [IMAGE, TEXT], ids=["image", "text"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_those_of_eager_attention_while_everything_fits(family, layout):
    model = getattr(tiny_models, family)()
    model.set_attn_implementation("eager")
    sizes = [6, 1, 8, 21]
    parts = tokens().split(sizes, dim=1)
    padding = torch.ones(2, 36, dtype=torch.long)
    padding[0, :3] = 0
    masks = [padding[:, :seen] for seen in (6, 7, 15, 36)]
    for name in ("linear", "streaming_llm"):
        plain = transformers.DynamicCache()
        with attach(model, layout, name, "1/1") as cache:
            for part, mask in zip(parts, masks, strict=True):
                (expected,) = attentions(model, plain, [part], attention_mask=mask)
                (given,) = attentions(model, cache, [part], attention_mask=mask)
                assert len(given) == len(expected) == 3
                for mine, eager in zip(given, expected, strict=True):
                    sees = mask[:, -part.shape[1] :].bool()
                    assert mine.shape == eager.shape == (2, 4, part.shape[1], mask.shape[1])
                    torch.testing.assert_close(
                        mine.transpose(1, 2)[sees], eager.transpose(1, 2)[sees]
                    )


@pytest.mark.parametrize(
    ("name", "where", "reclaim"), in_turn(EVICTING, ["image", "text"], turn=["lazy", "eager"])
)
def test_weights_fall_on_what_is_held(name, where, reclaim):
    """And several tokens at once report what they report one by one."""
    layout = {"image": IMAGE, "text": TEXT}[where]
    model = tiny_models.llama()
    with attach(model, layout, name, reclaim=reclaim) as cache:
        steps = []
        for part in (tokens()[:, :6], *tokens()[:, 6:].split(1, dim=1)):
            (given,) = attentions(model, cache, [part])
            steps.append(given)
            for layer, weights in enumerate(given):
                seen = cache.get_seq_length()
                assert weights.shape == (2, 4, part.shape[1], seen)
                torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, part.shape[1]))
                held = torch.zeros(2, 2, seen + 1)  # a column behind the last for empty slots
                places = cache.positions(layer)
                held.scatter_(2, places.where(places >= 0, seen), 1.0)
                lost = weights.amax(2).view(2, 2, 2, seen) * (1 - held[:, :, None, :seen])
                assert lost.max() == 0
    assert min(cache.stats().evictions) > 0
    with attach(model, layout, name, reclaim=reclaim) as cache:
        at_once = attentions(model, cache, tokens().split([6, 30], dim=1))[1]
    for layer, weights in enumerate(at_once):
        for query, step in enumerate(steps[1:]):
            mine, rest = weights[:, :, query].split([7 + query, 29 - query], dim=-1)
            torch.testing.assert_close(mine, step[layer][:, :, 0], atol=2e-5, rtol=1e-4)
            assert not rest.any()


def test_a_prompt_longer_than_the_budget_reports_the_whole_prompt():
    model = tiny_models.llama()
    eager = tiny_models.llama(attn_implementation="eager")
    with torch.inference_mode(), attach(model, TEXT) as cache:
        expected = eager(tokens(), output_attentions=True).attentions
        (given,) = attentions(model, cache, [tokens()])
    for mine, whole in zip(given, expected, strict=True):
        torch.testing.assert_close(mine, whole)


def test_generate_reports_weights_too():
    """Also where the model's configuration asks for them."""
    model = tiny_models.llama(attn_implementation="eager")
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    options |= {"attention_mask": torch.ones(2, 6, dtype=torch.long)}
    expected = model.generate(tokens(6), output_attentions=True, **options).attentions
    with attach(model, IMAGE, budget="1/1") as cache:
        given = model.generate(tokens(6), output_attentions=True, **as_argument(cache), **options)
    model.config.output_attentions = True
    with torch.inference_mode(), attach(model, IMAGE, budget="1/1") as cache:
        first = model(tokens(6), **as_argument(cache)).attentions
    assert len(given.attentions) == len(expected) == 8
    for mine, eager in zip([*given.attentions, first], [*expected, expected[0]], strict=True):
        for layer in range(3):
            torch.testing.assert_close(mine[layer], eager[layer])
