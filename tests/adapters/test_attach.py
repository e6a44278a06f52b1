"""attach(): whole transformers models under a policy."""

from __future__ import annotations

import threading

import pytest
import torch

import kvpolicy
import kvpolicy_adapters
from kvpolicy_adapters.transformers.cache_argument import as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

ROWS, COLS, VOCAB = 6, 5, 40
LAYOUT = kvpolicy.RasterLayout(rows=ROWS, cols=COLS, prefix=1)
LENGTH = LAYOUT.length
# Pooling makes neighbours tie but for rounding; without it, calls of any size decide alike.
SMALL = {
    "linear": {"anchors": 3},
    "linear2d": {"anchors": 3},
    "pyramid": {"window": 2, "interval": 3, "kernel": 1},
    "snapkv": {"window": 2, "interval": 3, "kernel": 1},
    "rkv": {"window": 2, "interval": 3, "kernel": 1},
    "ssd": {"window": 3},
}


def tiny(kv_heads: int = 2, **changes) -> transformers.LlamaForCausalLM:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    # Random weights of the usual size attend almost uniformly; sharpen them so that a wrong cache
    # changes tokens.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    return model


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda n: f"kv{n}")
def model(request):
    return tiny(request.param)


def make(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **SMALL.get(name, {}))


def classes(batch: int = 3) -> torch.Tensor:
    return torch.arange(1, batch + 1)[:, None]


def sequences() -> torch.Tensor:
    """No token comes twice: two of a kind have keys of one length, and which of them goes would
    hang on the last bit of a product, whose order of sums depends on how many rows it has."""
    generator = torch.Generator().manual_seed(5)
    order = torch.rand(3, VOCAB - 4, generator=generator).argsort(-1) + 4
    return torch.cat([classes(), order[:, : LENGTH - 1]], dim=1)


def generate(model, tokens, cache=None, **options):
    settings = {"max_new_tokens": LENGTH - 1, "do_sample": False} | options
    if cache is not None:
        settings |= as_argument(cache)
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)


SAMPLED = {"do_sample": True, "top_k": 0}


@pytest.fixture(scope="module")
def plain(model):
    """What the model says with its own cache: greedily, and drawn."""
    greedy = generate(model, classes())
    torch.manual_seed(7)
    return greedy, generate(model, classes(), **SAMPLED)


@pytest.mark.parametrize("name", kvpolicy.available())
def test_lossless_when_it_fits(model, plain, name):
    tokens, (greedy, drawn) = classes(), plain
    # Each way to reclaim with every policy and with every model, if not with each of their pairs.
    turn = kvpolicy.available().index(name) + model.config.num_key_value_heads.bit_length()
    reclaim = ("lazy", "eager")[turn % 2]
    with kvpolicy_adapters.attach(
        model, policy=make(name), budget="1/1", layout=LAYOUT, reclaim=reclaim
    ) as cache:
        assert torch.equal(generate(model, tokens, cache), greedy)
        cache.reset()
        torch.manual_seed(7)
        assert torch.equal(generate(model, tokens, cache, **SAMPLED), drawn)
    assert cache.stats().evictions == (0, 0, 0)


@pytest.mark.parametrize("name", kvpolicy.available())
def test_logits_equal_the_full_cache_step_by_step(model, name):
    tokens = sequences()
    with (
        torch.inference_mode(),
        kvpolicy_adapters.attach(model, policy=make(name), budget="1/1", layout=LAYOUT) as cache,
    ):
        expected = model(tokens, use_cache=False).logits
        one_by_one = torch.cat(
            [model(token, **as_argument(cache)).logits for token in tokens.split(1, dim=1)], dim=1
        )
        cache.reset()
        at_once = model(tokens, **as_argument(cache)).logits
    torch.testing.assert_close(one_by_one, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(at_once, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(set(kvpolicy.available()) - {"full"}))
def test_chunked_calls_equal_one_by_one_under_eviction(model, name):
    tokens = sequences()
    results = []
    for chunks in ([1] * LENGTH, [LENGTH], [1, 7, 2, 11, LENGTH - 21]):
        with (
            torch.inference_mode(),
            kvpolicy_adapters.attach(model, policy=make(name), budget=15, layout=LAYOUT) as cache,
        ):
            logits = [
                model(part, **as_argument(cache)).logits for part in tokens.split(chunks, dim=1)
            ]
            held = [cache.positions(layer).sort().values for layer in range(3)]
        assert min(cache.stats().evictions) > 0
        results.append((torch.cat(logits, dim=1), held))
    for logits, held in results[1:]:
        torch.testing.assert_close(logits, results[0][0], atol=2e-5, rtol=0)
        for mine, first in zip(held, results[0][1], strict=True):
            assert torch.equal(mine, first)


def test_eviction_changes_what_the_model_says(model):
    """The tests above would pass on a cache that never evicts, were it not for this one."""
    with (
        torch.inference_mode(),
        kvpolicy_adapters.attach(model, policy=make("linear"), budget=13, layout=LAYOUT) as cache,
    ):
        logits = model(sequences(), **as_argument(cache)).logits
        assert (logits - model(sequences()).logits).abs().max() > 0.1
    assert cache.stats().peak_tokens == (14, 14, 14)


def test_the_model_is_as_it_was_after_the_block(model):
    before = model.config._attn_implementation
    with (
        pytest.raises(RuntimeError, match="boom"),
        kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT),
    ):
        assert model.config._attn_implementation == "kvpolicy"
        raise RuntimeError("boom")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_calls_without_the_cache_are_untouched_inside_the_block(implementation):
    model = tiny(attn_implementation=implementation)
    tokens = torch.randint(1, VOCAB, (2, 9))
    padded = torch.ones_like(tokens)
    padded[0, :4] = 0
    with torch.inference_mode():
        plain = model(tokens).logits
        masked = model(tokens, attention_mask=padded).logits
        greedy = generate(model, tokens, max_new_tokens=5)
        with kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT):
            assert torch.equal(model(tokens).logits, plain)
            assert torch.equal(model(tokens, attention_mask=padded).logits, masked)
            assert torch.equal(generate(model, tokens, max_new_tokens=5), greedy)
    assert model.config._attn_implementation == implementation


def test_nested_blocks_keep_the_model_attached_until_the_last_ends(model):
    with kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT) as outer:
        with kvpolicy_adapters.attach(model, policy=make("linear"), budget=13, layout=LAYOUT) as c:
            generate(model, classes(), c)
        generate(model, classes(), outer)
    assert c.stats().peak_tokens == (14, 14, 14)
    assert outer.stats().peak_tokens == (9, 9, 9)
    assert model.config._attn_implementation == "sdpa"


def test_two_threads_on_one_model_do_not_see_each_other(model):
    jobs = {"h2o": 8, "linear": 13, "streaming_llm": 9, "random": 10}

    def draw(name: str) -> torch.Tensor:
        with kvpolicy_adapters.attach(
            model, policy=make(name), budget=jobs[name], layout=LAYOUT
        ) as cache:
            return generate(model, classes(), cache)

    alone = {name: draw(name) for name in jobs}
    together: dict[str, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda name=name: together.update({name: draw(name)}))
        for name in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == alone.keys()
    for name in jobs:
        assert torch.equal(together[name], alone[name]), name
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["linear", "h2o", "pyramid"])
def test_beam_search_and_several_sequences_when_it_fits(model, name):
    for options in (
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ):
        expected = generate(model, classes(), max_new_tokens=20, **options)
        with kvpolicy_adapters.attach(
            model, policy=make(name), budget="1/1", layout=LAYOUT
        ) as cache:
            out = generate(model, classes(), cache, max_new_tokens=20, **options)
        assert torch.equal(out, expected)


def test_beams_carry_their_decisions_along(model):
    """Reordering the batch under eviction equals having decoded those sequences all along."""
    tokens = sequences()
    order = torch.tensor([2, 0, 0])

    def run(swap: bool) -> torch.Tensor:
        with (
            torch.inference_mode(),
            kvpolicy_adapters.attach(
                model, policy=make("linear"), budget=15, layout=LAYOUT
            ) as cache,
        ):
            first = tokens[:, :19] if swap else tokens[order, :19]
            model(first, **as_argument(cache))
            if swap:
                cache.reorder_cache(order)
            return model(tokens[order, 19:], **as_argument(cache)).logits

    torch.testing.assert_close(run(swap=True), run(swap=False), atol=1e-5, rtol=0)


def test_batch_selection_and_repetition(model):
    tokens = torch.randint(1, VOCAB, (3, 8))
    with (
        torch.inference_mode(),
        kvpolicy_adapters.attach(model, policy="h2o", budget=20, layout=LAYOUT) as cache,
    ):
        model(tokens, **as_argument(cache))
        before = cache.positions(0).clone()
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.positions(0), before.repeat_interleave(2, dim=0))
        cache.batch_select_indices(torch.tensor([0, 5]))
        logits = model(tokens[[0, 2]], **as_argument(cache)).logits
        cache.reset()
        twice = torch.cat([tokens, tokens], dim=1)[[0, 2]]
        expected = model(twice, **as_argument(cache)).logits[:, 8:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_left_padding_is_never_attended_to(model):
    """A padded prompt in a text layout gives what the prompt gives alone, while it fits."""
    prompt = torch.randint(1, VOCAB, (1, 6))
    alone = generate(model, prompt, max_new_tokens=8)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(11) >= 5).long()[None]
    layout = kvpolicy.TextLayout(length=40)
    with kvpolicy_adapters.attach(model, policy="h2o", budget=40, layout=layout) as cache:
        out = model.generate(
            padded, attention_mask=mask, **as_argument(cache), max_new_tokens=8, do_sample=False
        )
    assert torch.equal(out[:, 11:], alone[:, 6:])


@pytest.mark.parametrize("name", ["h2o", "linear", "pyramid", "streaming_llm", "random"])
def test_text_prompts_longer_than_the_budget(model, name):
    """The prompt attends in full, so its logits are exact; then the budget holds."""
    tokens = torch.randint(1, VOCAB, (2, 50))
    layout = kvpolicy.TextLayout(sinks=2)
    with (
        torch.inference_mode(),
        kvpolicy_adapters.attach(model, policy=make(name), budget=12, layout=layout) as cache,
    ):
        exact = model(tokens[:, :40], use_cache=False).logits
        logits = model(tokens[:, :40], **as_argument(cache)).logits
        torch.testing.assert_close(logits, exact, atol=1e-5, rtol=0)
        for token in tokens[:, 40:].split(1, dim=1):
            model(token, **as_argument(cache))
        for layer, budget in enumerate(cache.stats().budgets):
            held = cache.positions(layer)
            assert held.shape[-1] == 2 + budget
            assert (held == 0).sum(-1).eq(1).all()
            assert (held == 1).sum(-1).eq(1).all()
            assert (held == 49).sum(-1).eq(1).all()
    assert sum(cache.stats().budgets) == 3 * 12


def test_halves_give_up_what_the_first_does(model):
    """As under guidance: the second half has other tokens, and keeps the same places."""
    tokens = sequences()[:2]
    held = {}
    for halves in ("own", "first"):
        how = {"policy": make("linear"), "budget": "1/2", "layout": LAYOUT, "halves": halves}
        with torch.inference_mode(), kvpolicy_adapters.attach(model, **how) as cache:
            for position in range(LENGTH):
                model(tokens[:, position : position + 1], **as_argument(cache))
            held[halves] = [cache.policy_cache.positions(layer) for layer in range(3)]
    for own, first in zip(held["own"], held["first"], strict=True):
        assert torch.equal(first[0], first[1])
        assert torch.equal(first[0], own[0])
    assert any(not torch.equal(own[1], own[0]) for own in held["own"])


def test_a_cache_is_refused_after_its_block(model):
    with kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT) as cache:
        pass
    with pytest.raises(kvpolicy.CacheStateError, match="block has ended"):
        generate(model, classes(), cache)


def test_a_cache_of_a_smaller_model_is_refused(model):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    small = transformers.LlamaForCausalLM(config)
    with (
        kvpolicy_adapters.attach(small, policy="h2o", budget=8, layout=LAYOUT) as cache,
        kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT),
        pytest.raises(kvpolicy.CacheStateError, match="made for another LlamaForCausalLM object"),
    ):
        generate(model, classes(), cache)


def test_the_batch_may_not_change(model):
    with kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT) as cache:
        model(classes(3), **as_argument(cache))
        with pytest.raises(kvpolicy.CacheStateError, match="batch changed from 3 to 2"):
            model(classes(2), **as_argument(cache))


def test_too_many_tokens_for_the_raster(model):
    with (
        kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT) as cache,
        pytest.raises(kvpolicy.LayoutError, match="position 31 is outside"),
    ):
        generate(model, classes(), cache, max_new_tokens=LENGTH + 3)


def test_taking_tokens_back_is_refused(model):
    with kvpolicy_adapters.attach(model, policy="h2o", budget=8, layout=LAYOUT) as cache:
        model(classes(), **as_argument(cache))
        with pytest.raises(kvpolicy.CacheStateError, match="crop"):
            cache.crop(-1)


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), "llama", None])
def test_what_is_no_model_is_refused(wrong):
    with (
        pytest.raises(kvpolicy.ParameterError, match="PreTrainedModel"),
        kvpolicy_adapters.attach(wrong, policy="h2o", budget=8, layout=LAYOUT),
    ):
        pass
