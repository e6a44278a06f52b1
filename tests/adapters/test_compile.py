"""A compiled decode step: one graph, compiled once, and the same decisions as without."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from support.kernel_library import COMPILER, needs_compiler
from support.turns import in_turn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import kvpolicy
from kvpolicy import CacheStateError, ParameterError, RasterLayout
from kvpolicy.ops.cpu import native
from kvpolicy_adapters import attach, compile_decode
from kvpolicy_adapters.images.llamagen import LlamaGen, LlamaGenConfig
from kvpolicy_adapters.transformers.cache_argument import as_argument

LAYERS, BATCH, VOCAB = 2, 2, 50
LAYOUT = RasterLayout(rows=6, cols=6, prefix=2)
SMALL = {"linear": {"anchors": 6}, "linear2d": {"anchors": 6}, "pyramid": {"beta": 2.0}}


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes, **heads, vocab_size=VOCAB, max_position_embeddings=128)
    return LlamaForCausalLM(config).eval()


def tokens(length: int = LAYOUT.length) -> torch.Tensor:
    return torch.randint(VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(1))


def policy(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **SMALL.get(name, {}))


def draw(model, cache, prompt: int, given: torch.Tensor, mask=None) -> torch.Tensor:
    """The logits behind every token, one token at a time behind a prompt."""
    first = None if mask is None else mask[:, :prompt]
    logits = [model(given[:, :prompt], attention_mask=first, **as_argument(cache)).logits[:, -1]]
    for position in range(prompt, given.shape[1]):
        seen = None if mask is None else mask[:, : position + 1]
        one = given[:, position : position + 1]
        logits.append(model(one, attention_mask=seen, **as_argument(cache)).logits[:, -1])
    return torch.stack(logits)


def both(model, name, given, *, prompt=2, mask=None, backend=None, images=1, **options):
    """Logits, positions and stats without and with compile_decode."""
    results = []
    for compiled in (False, True):
        with (
            torch.inference_mode(),
            attach(model, policy=policy(name), **{"layout": LAYOUT, "budget": 18, **options}) as c,
            compile_decode(model, c, backend=backend or "eager") if compiled else nullcontext(),
        ):
            for _ in range(images):
                c.reset()
                logits = draw(model, c, prompt, given, mask)
            held = [c.positions(layer).sort().values for layer in range(LAYERS)]
            readings = [o.mass for each in c.policy_cache.layers for o in each.observers]
            results.append((logits, held, c.stats(), readings))
    (ours, held, stats, read), (theirs, held_too, stats_too, read_too) = results
    torch.testing.assert_close(read_too, read, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(held, held_too, strict=True))
    assert stats == stats_too
    return stats


@pytest.mark.parametrize("name", ["linear", "streaming_llm", "h2o"])
def test_one_graph_for_whole_images(model, name):
    counter = CompileCounter()
    stats = both(model, name, tokens(), backend=counter, images=2)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    assert min(stats.evictions) > 0


#: Victims that are hidden at once are so whoever named them: once a line, a token, an interval.
DECIDING = [(name, "lazy") for name in kvpolicy.available() if name != "full"]
DECIDING += [(name, "eager") for name in ("linear", "h2o", "snapkv")]


@pytest.mark.parametrize(("name", "reclaim"), DECIDING)
def test_every_policy_decides_as_it_does_without(model, name, reclaim):
    stats = both(model, name, tokens(), reclaim=reclaim)
    assert min(stats.evictions) > 0


@pytest.fixture
def steps(kernel, monkeypatch):
    """How often compiled code was given the CPU kernel."""
    given = []
    found = native.stepper(torch.float32)
    monkeypatch.setattr(native, "stepper", lambda dtype: given.append(found) or found)
    return given


@needs_compiler
@pytest.mark.parametrize(
    ("name", "reclaim"), in_turn(["linear", "h2o", "streaming_llm", "tova"], turn=["lazy", "eager"])
)
def test_the_cpu_kernel_serves_a_compiled_step(model, steps, name, reclaim):
    """Empty slots, while the budget fills and where victims are hidden at once, stay unseen."""
    counter = CompileCounter()
    stats = both(model, name, tokens(), reclaim=reclaim, backend=counter, images=2)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    assert min(stats.evictions) > 0
    assert len(steps) == 2 * LAYERS  # of each image


@needs_compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_writes_into_the_slots_themselves(model, steps):
    """A compiler that copied what an operator writes to would read the whole cache twice."""
    with (
        torch.inference_mode(),
        attach(model, policy="h2o", budget=18, layout=LAYOUT) as cache,
        compile_decode(model, cache),
    ):
        _, sources = run_and_get_code(draw, model, cache, 2, tokens())
        slots = cache.policy_cache.layers[0].store.keys.shape
    assert steps
    (source,) = sources
    assert source.count("torch.ops.kvpolicy_cpu.decode_step.default(") == LAYERS
    assert f", {tuple(slots)}, " in source  # as an input
    assert f"empty_strided_cpu({tuple(slots)}" not in source
    assert "copy_(" not in source


@pytest.mark.slow
def test_a_number_that_changes_is_what_the_count_finds(model):
    """What the guard is there for: a position that is a number is compiled in, again and again."""
    counter = CompileCounter()
    with torch.inference_mode(), attach(model, policy="random", budget=18, layout=LAYOUT) as cache:
        given = tokens()
        model(given[:, :2], **as_argument(cache))
        step = torch.compile(model.forward, backend=counter)
        for position in range(2, 5):
            step(given[:, position : position + 1], **as_argument(cache))
    assert counter.frame_count > 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_gives_the_same(model):
    counter = CompileCounterWithBackend("inductor")
    both(model, "linear", tokens(), backend=counter)
    assert counter.frame_count == 1


@pytest.fixture(params=["torch", "kernel"])
def engine(request):
    """Both ways of attending, for what the kernel must leave to the other."""
    if request.param == "kernel":
        if COMPILER is None:
            pytest.skip("no C++ compiler is installed")
        request.getfixturevalue("kernel")


def test_padding_of_an_images_prompt_stays_hidden(model, engine):
    layout = RasterLayout(rows=6, cols=6, prefix=5)
    mask = torch.ones(BATCH, layout.length, dtype=torch.int64)
    mask[0, :3] = 0
    given = tokens(layout.length)
    both(model, "h2o", given, prompt=5, mask=mask, layout=layout)
    other = given.clone()
    other[0, :3] = (given[0, :3] + 1) % VOCAB
    logits = []
    for each in (given, other):
        with (
            torch.inference_mode(),
            attach(model, policy="h2o", budget=18, layout=layout) as cache,
            compile_decode(model, cache, backend="eager"),
        ):
            logits.append(draw(model, cache, 5, each, mask))
    torch.testing.assert_close(*logits)


def test_a_sliding_window_hides_what_lies_behind_it(engine):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, vocab_size=VOCAB)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=20)).eval()
    # It decides every eight tokens; in between, tokens that drop out of sight are still there.
    both(model, "snapkv", tokens(60), layout=kvpolicy.TextLayout(sinks=0), budget=18)


def test_padding_of_a_text(model, engine):
    mask = torch.ones(BATCH, 30, dtype=torch.int64)
    mask[1, :4] = 0
    layout = kvpolicy.TextLayout(sinks=2)
    both(model, "h2o", tokens(30), prompt=8, mask=mask, layout=layout, budget=12)


def test_generate_runs_through_it(model):
    prompt = tokens(2)
    drawn = []
    for compiled in (False, True):
        counter = CompileCounter()
        with (
            attach(model, policy=policy("linear"), budget=18, layout=LAYOUT) as cache,
            compile_decode(model, cache, backend=counter) if compiled else nullcontext(),
        ):
            drawn.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    **as_argument(cache),
                    max_new_tokens=36,
                    do_sample=False,
                )
            )
    assert torch.equal(*drawn)
    assert counter.frame_count == 1


def test_llamagen_draws_through_it():
    config = LlamaGenConfig(
        grid_size=6, vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaGen(config).eval()
    drawn = []
    for compiled in (False, True):
        counter = CompileCounter()
        with (
            attach(model, policy=policy("linear"), budget=18) as cache,
            compile_decode(model, cache, backend=counter) if compiled else nullcontext(),
        ):
            drawn.append(
                model.generate(
                    torch.tensor([3, 4]), cfg_scale=2.0, do_sample=False, **as_argument(cache)
                )
            )
    assert torch.equal(*drawn)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


def test_other_calls_run_as_ever_and_the_model_is_left_as_it_was(model):
    before = dict(model.__dict__)
    given = tokens(6)
    counter = CompileCounter()
    with torch.inference_mode():
        plain = model(given).logits
        with (
            attach(model, policy=policy("linear"), budget=18, layout=LAYOUT) as cache,
            compile_decode(model, cache, backend=counter),
        ):
            torch.testing.assert_close(model(given).logits, plain)
            model(given, **as_argument(cache))  # a prompt
            model(given[:, :2], **as_argument(cache))  # two tokens at once
            assert counter.frame_count == 0
            model(given[:, :1], **as_argument(cache))
            assert counter.frame_count == 1
    assert dict(model.__dict__) == before


def test_a_step_that_fails_takes_nothing(model):
    """The slot is handed back, and the next step goes on as if nothing had been."""
    given = tokens()
    with (
        torch.inference_mode(),
        attach(model, policy=policy("linear"), budget=18, layout=LAYOUT) as cache,
        compile_decode(model, cache, backend="eager"),
    ):
        model(given[:, :2], **as_argument(cache))
        for position in range(2, 30):
            if position in (5, 27):  # while it fills, and after
                with pytest.raises(RuntimeError):  # torch's, of a matrix of the wrong size
                    model(inputs_embeds=torch.zeros(BATCH, 1, 7), **as_argument(cache))
            model(given[:, position : position + 1], **as_argument(cache))
        stats, held = cache.stats(), cache.positions(1).sort().values
    with (
        torch.inference_mode(),
        attach(model, policy=policy("linear"), budget=18, layout=LAYOUT) as cache,
    ):
        draw(model, cache, 2, given[:, :30])
        assert cache.stats() == stats
        assert torch.equal(cache.positions(1).sort().values, held)


def test_wrong_uses(model):
    with attach(model, policy=policy("linear"), budget=18, layout=LAYOUT) as cache:
        with pytest.raises(ParameterError, match="not Linear and TransformersCache"):
            compile_decode(torch.nn.Linear(2, 2), cache).__enter__()
        with (
            pytest.raises(CacheStateError, match="has not seen a token"),
            cache.policy_cache.step(),
        ):
            pass
        with torch.inference_mode(), compile_decode(model, cache, backend="eager"):
            model(tokens()[:, :2], **as_argument(cache))
            with cache.policy_cache.step(), pytest.raises(CacheStateError, match="has begun"):
                model(tokens()[:, 2:3], **as_argument(cache))
            model(tokens()[:, 2:3], **as_argument(cache))


def decode_past_the_compiled_call(model):
    with (
        torch.inference_mode(),
        attach(model, policy=policy("linear"), budget=18, layout=LAYOUT) as cache,
        compile_decode(model, cache, backend="eager"),
    ):
        for token in tokens(6).split(1, dim=1):
            model.model(token, **as_argument(cache))


def decode_with_another_cache(model):
    with (
        torch.inference_mode(),
        attach(model, policy=policy("linear"), budget=18, layout=LAYOUT) as cache,
        compile_decode(model, cache, backend="eager"),
    ):
        other = DynamicCache()
        for token in tokens(6).split(1, dim=1):
            model(token, **as_argument(other))


@pytest.mark.parametrize(
    ("decode", "said"),
    [
        (decode_past_the_compiled_call, "compiled no step: of 0 calls"),
        (decode_with_another_cache, "compiled no step: of 6 calls .*, 0 brought the cache"),
    ],
)
def test_a_block_that_compiles_nothing_says_so(model, decode, said):
    with pytest.warns(RuntimeWarning, match=said):
        decode(model)
