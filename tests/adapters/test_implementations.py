"""A policy sees what the model's mask says, whatever attention the model was loaded with."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo
import transformers
from torch.nn import functional
from transformers import AttentionInterface

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.transformers.cache_argument import as_argument

VOCAB, WINDOW = 61, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral: windows": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2: windows beside all": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=None
    ),
}


def flash_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    scaling=None,
    sliding_window=None,
    is_causal=None,
    **kwargs,
):
    """Flash attention's conventions without its kernel: a padding mask [B, tokens] or nothing,
    a window as a number, causal from the lower right corner; and its name in the configuration."""
    if module.config._attn_implementation != "flash_attention_2":
        raise ValueError(f"unknown implementation {module.config._attn_implementation}")
    assert attention_mask is None or attention_mask.ndim == 2
    places = torch.arange(key.shape[2])
    mine = places[-query.shape[2] :, None]
    seen = places <= mine
    if sliding_window is not None:
        seen = seen & (places > mine - sliding_window)
    seen = seen[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def model(name: str, implementation: str):
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for layer in made.model.layers:
        layer.self_attn.q_proj.weight.data *= 12
        layer.self_attn.k_proj.weight.data *= 12
    # Not by set_attn_implementation, which looks for the package.
    made.config._attn_implementation_internal = implementation
    return made


@pytest.fixture(autouse=True)
def flash_stands_in(monkeypatch):
    before = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    AttentionInterface.register("flash_attention_2", flash_attention)
    yield
    AttentionInterface.register("flash_attention_2", before)


def prompt(padding: int = 0):
    tokens = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return tokens, mask


def logits(made, cache, padding: int) -> torch.Tensor:
    """Behind a prompt, then behind chunks, then behind tokens one by one."""
    tokens, mask = prompt(padding)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs, seen = [], 0
    for size in (10, 7, 9, *[1] * 14):
        part = slice(seen, seen + size)
        output = made(
            tokens[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=places[:, part],
            use_cache=True,
            **as_argument(cache),
        )
        outputs.append(output.logits * mask[:, part, None])
        seen += size
    return torch.cat(outputs, dim=1)


def under_h2o(name: str, implementation: str, budget: int, padding: int) -> torch.Tensor:
    made, layout = model(name, implementation), kvpolicy.TextLayout(sinks=2)
    with torch.inference_mode(), attach(made, policy="h2o", budget=budget, layout=layout) as cache:
        given = logits(made, cache, padding)
    assert max(cache.stats().evictions) > 0 or budget == 24
    return given


@functools.cache
def on_sdpa(name: str, budget: int, padding: int) -> torch.Tensor:
    return under_h2o(name, "sdpa", budget, padding)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
def test_a_policy_gives_what_it_gives_on_sdpa(implementation, name, padding):
    for budget in (12, 24):  # windows under the policy, and left alone
        if implementation == "flex_attention" and budget == 24 and "windows" in name:
            continue  # layers that are left alone run flex attention's own kernel
        given = under_h2o(name, implementation, budget, padding)
        torch.testing.assert_close(given, on_sdpa(name, budget, padding), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_calls_without_the_cache_run_the_kernel_that_was_loaded(name, padding):
    made = model(name, "flash_attention_2")
    with torch.inference_mode():
        plain = logits(made, transformers.DynamicCache(config=made.config), padding)
        with attach(made, policy="h2o", budget=12, layout=kvpolicy.TextLayout()):
            inside = logits(made, transformers.DynamicCache(config=made.config), padding)
        reference = model(name, "sdpa")
        expected = logits(reference, transformers.DynamicCache(config=made.config), padding)
    assert torch.equal(inside, plain)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)
    assert made.config._attn_implementation == "flash_attention_2"


#: Each model and each kernel: a compiler takes five seconds, and a model's mask is its own in both.
COMPILED = list(zip(CONFIGS, ["flash_attention_2", "flex_attention"] * 2, strict=False))


@pytest.mark.parametrize(("name", "implementation"), COMPILED)
def test_a_compiled_call_without_the_cache(name, implementation):
    """A compiler can't be told whose mask it traces: these kernels would not take it."""
    tokens, mask = prompt(4)
    with torch.inference_mode():
        expected = model(name, "sdpa")(tokens, attention_mask=mask).logits
        made = model(name, implementation)
        torch._dynamo.reset()
        compiled = torch.compile(made, backend="eager")
        with attach(made, policy="h2o", budget=12, layout=kvpolicy.TextLayout()):
            given = compiled(tokens, attention_mask=mask).logits
    live = mask.bool()
    torch.testing.assert_close(given[live], expected[live], atol=1e-4, rtol=1e-4)


def test_everything_fits_and_nothing_differs_under_flash():
    for name in CONFIGS:
        made = model(name, "flash_attention_2")
        with torch.inference_mode():
            plain = logits(made, transformers.DynamicCache(config=made.config), 3)
            layout = kvpolicy.TextLayout(length=64)
            with attach(made, policy="h2o", budget=64, layout=layout) as cache:
                given = logits(made, cache, 3)
        torch.testing.assert_close(given, plain, atol=1e-4, rtol=1e-4)


def test_a_mask_that_is_a_program_is_refused():
    made = model("llama", "sdpa")
    tokens, _ = prompt()
    from torch.nn.attention.flex_attention import create_block_mask

    program = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 40, 40, device="cpu")
    with (
        torch.inference_mode(),
        attach(made, policy="h2o", budget=12, layout=kvpolicy.TextLayout()) as cache,
        pytest.raises(kvpolicy.ModelError, match="BlockMask, and a policy must know"),
    ):
        made(tokens, attention_mask=program, **as_argument(cache))
