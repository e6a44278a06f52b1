"""Odd contexts: mixed precision, cross-attention, weights and chunks where a step is compiled."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo
import transformers
from support import tiny_models

import kvpolicy
from kvpolicy_adapters import attach, compile_decode
from kvpolicy_adapters.transformers.cache_argument import as_argument

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
TEXT = kvpolicy.TextLayout(sinks=1, length=64)


def tokens(length: int = 8, batch: int = 2) -> torch.Tensor:
    order = torch.rand(batch, 59, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return 1 + order[:, :length]


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast_on_float32_weights(name, dtype):
    """Rotation and norms give float32 there, products half: keys and values differ in dtype."""
    model = getattr(tiny_models, name)()
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        expected = model(tokens(20)).logits.float()
        with attach(model, policy="h2o", budget="1/1", layout=TEXT) as cache:
            parts = tokens(20).split([8] + [1] * 12, 1)
            logits = [model(part, **as_argument(cache)).logits for part in parts]
        given = torch.cat(logits, dim=1).float()
        with attach(model, policy="h2o", budget=8, layout=TEXT) as cache:
            for part in tokens(20).split([8] + [1] * 12, 1):
                assert model(part, **as_argument(cache)).logits.isfinite().all()
    assert cache.stats().peak_tokens == (9, 9, 9)
    torch.testing.assert_close(given, expected, atol=0.15, rtol=0.05)


def test_keys_and_values_of_different_dtypes():
    """As of models whose norm of the keys stays in float32."""
    model = tiny_models.llama().to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: out.float())
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: out.float())
    layout = kvpolicy.TextLayout(sinks=1, length=64)
    with torch.inference_mode(), attach(model, policy="h2o", budget=8, layout=layout) as cache:
        for token in tokens(20).split(1, 1):
            assert model(token, **as_argument(cache)).logits.isfinite().all()
    assert cache.stats().peak_tokens == (9, 9, 9)


def test_weights_in_eight_bits():
    """Of torch's own dynamic quantisation: a policy sees keys and values, which stay floats."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no 8-bit products for this processor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its successor is another package
        model = torch.ao.quantization.quantize_dynamic(
            tiny_models.llama(), {torch.nn.Linear}, dtype=torch.qint8
        )
    expected = model.generate(tokens(), **GREEDY)
    with attach(model, policy="h2o", budget="1/1", layout=TEXT) as cache:
        assert torch.equal(model.generate(tokens(), **GREEDY, **as_argument(cache)), expected)
    with attach(model, policy="h2o", budget=8, layout=TEXT) as cache:
        model.generate(tokens(), **GREEDY, **as_argument(cache))
    assert cache.stats().peak_tokens == (9, 9, 9)


def test_weights_of_a_step_that_would_be_compiled():
    model = tiny_models.llama(attn_implementation="eager")
    options = GREEDY | {"return_dict_in_generate": True, "output_attentions": True}
    expected = model.generate(tokens(), **options).attentions
    with (
        pytest.warns(RuntimeWarning, match="compiled no step"),
        attach(model, policy="h2o", budget="1/1", layout=TEXT) as cache,
        compile_decode(model, cache, backend="eager"),
    ):
        given = model.generate(tokens(), **options, **as_argument(cache)).attentions
    assert len(given) == len(expected) == 16
    for mine, theirs in zip(given, expected, strict=True):
        assert len(mine) == 3
        for layer in range(3):
            torch.testing.assert_close(mine[layer], theirs[layer])


def llama4():
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=16,
        layer_types=["chunked_attention"] * 3 + ["full_attention"], pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config).eval()


def test_chunks_are_no_windows_that_slide():
    """Where the budget is smaller than a chunk, so that these layers come under the policy."""
    model = llama4()
    with (
        attach(model, policy="h2o", budget=12, layout=kvpolicy.TextLayout()) as cache,
        pytest.raises(kvpolicy.ParameterError, match=r"layers \[0, 1, 2\] .* within chunks"),
        compile_decode(model, cache, backend="eager"),
    ):
        pass


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("budget", [12, 15, 40], ids=["evicting", "nearly", "left alone"])
def test_chunks_behind_the_first(budget, padding):
    """A chunk's first token sees itself alone; against one call with masks, and no cache."""
    model = llama4()
    ids = tokens(50)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    layout = kvpolicy.TextLayout(sinks=0, length=60)
    policy = kvpolicy.create("streaming_llm", sinks=0)
    made = attach(model, policy=policy, budget=budget, layout=layout)
    outputs, seen = [], 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode(), made as cache:
        assert cache.stats().left_alone == ((0, 1, 2) if budget == 40 else ())
        for size in (8, *[1] * 42):
            part = slice(seen, seen + size)
            given = {"attention_mask": mask[:, : part.stop], "position_ids": places[:, part]}
            outputs.append(model(ids[:, part], **given, **as_argument(cache)).logits)
            seen += size
        place = torch.arange(50)
        held = place > place[:, None] - budget
        causal = place <= place[:, None]
        live = mask.bool()[:, None, None, :]
        lead = (mask == 0).sum(-1)[:, None, None, None]
        chunk = (place - lead) // 16 == (place[:, None] - lead) // 16
        masks = {
            "full_attention": causal & held & live,
            "chunked_attention": causal & held & live & chunk,
        }
        own = {"position_ids": places, "use_cache": False}
        expected = model(ids, attention_mask=masks, **own).logits
    rows = mask.bool()
    torch.testing.assert_close(torch.cat(outputs, 1)[rows], expected[rows], atol=1e-4, rtol=1e-4)


def mllama():
    torch.manual_seed(0)
    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1, 3],
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(**text)
    made = transformers.MllamaForCausalLM(config).eval()
    for layer in (1, 3):  # gates begin closed
        made.model.layers[layer].cross_attn_attn_gate.data.fill_(1.0)
        made.model.layers[layer].cross_attn_mlp_gate.data.fill_(1.0)
    return made


def test_layers_of_cross_attention_are_left_alone():
    model = mllama()
    ids = tokens(30)
    image = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))

    def run(cache):
        logits, seen = [], 0
        for size in (8, *[1] * 22):
            given = {"cross_attention_states": image} if seen == 0 else {}
            part = ids[:, seen : seen + size]
            logits.append(model(part, use_cache=True, **given, **as_argument(cache)).logits)
            seen += size
        return torch.cat(logits, 1)

    with torch.inference_mode():
        expected = run(transformers.DynamicCache(config=model.config))
        with attach(model, policy="h2o", budget=40, layout=kvpolicy.TextLayout()) as cache:
            given = run(cache)
            assert cache.stats().left_alone == (1, 3)
        with attach(model, policy="h2o", budget=9, layout=kvpolicy.TextLayout()) as cache:
            run(cache)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    peaks = cache.stats().peak_tokens
    assert (peaks[0], peaks[2]) == (9, 9)
    assert (peaks[1], peaks[3]) == (10, 10)  # the image's


def test_decoders_that_attend_to_an_encoder_are_refused():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True
    )
    with (
        pytest.raises(kvpolicy.ModelError, match="attends to an encoder"),
        attach(transformers.GPT2LMHeadModel(config), policy="h2o", budget=8),
    ):
        pass


def opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=1, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


@pytest.mark.parametrize("given", ["nothing", "a mask"])
def test_models_that_count_positions_in_the_mask_in_a_compiled_loop(given):
    """OPT and its like work positions out of the mask, which a compiled step replaces."""
    model = opt()
    ids = tokens(30) + 2

    def run(cache):
        logits, seen = [], 0
        for size in (8, *[1] * 22):
            options = {} if given == "nothing" else {"attention_mask": torch.ones(2, seen + size)}
            part = ids[:, seen : seen + size]
            logits.append(model(part, use_cache=True, **options, **as_argument(cache)).logits)
            seen += size
        return torch.cat(logits, 1)

    with torch.inference_mode():
        expected = run(transformers.DynamicCache(config=model.config))
        with (
            attach(model, policy="h2o", budget=40, layout=kvpolicy.TextLayout()) as cache,
            compile_decode(model, cache, backend="eager"),
        ):
            compiled = run(cache)
    torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)
