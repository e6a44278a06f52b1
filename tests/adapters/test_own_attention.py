"""Models that compute their attention themselves: exact, and for the block alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import slow_reference

import kvpolicy
from kvpolicy_adapters import attach, compile_decode
from kvpolicy_adapters.transformers.cache_argument import as_argument
from kvpolicy_adapters.transformers.own_attention import own_attention

VOCAB, PROMPT, NEW, BUDGET = 61, 9, 14, 7
COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "bos_token_id": None, "eos_token_id": None}
FALCON = COMMON | {"num_hidden_layers": 3, "num_attention_heads": 4, "bias": True}
#: How much of a head GPT-NeoX-Japanese rotates; by itself it fails on less than all of it in 5.17.
PARTLY = 1.0 if transformers.__version__.startswith("5.17.") else 0.5
#: Of each: its configuration, and how it can be loaded.
MODELS = {
    "bloom": (
        lambda: transformers.BloomConfig(**COMMON, n_layer=3, n_head=4),
        ["eager"],
    ),
    "falcon, shared keys": (
        lambda: transformers.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
        ["eager", "sdpa"],
    ),
    "falcon, one key": (
        lambda: transformers.FalconConfig(**FALCON, multi_query=True),
        ["eager", "sdpa"],
    ),
    "falcon, ALiBi": (
        lambda: transformers.FalconConfig(
            **FALCON, alibi=True, multi_query=False, parallel_attn=False
        ),
        ["eager", "sdpa"],
    ),
    "gpt-neo": (
        lambda: transformers.GPTNeoConfig(
            **COMMON,
            num_layers=4,
            num_heads=4,
            attention_types=[[["global", "local"], 2]],
            window_size=6,
            max_position_embeddings=64,
        ),
        ["eager"],
    ),
    "gpt-neox-japanese": (
        lambda: transformers.GPTNeoXJapaneseConfig(
            **COMMON, num_hidden_layers=3, num_attention_heads=4, intermediate_multiple_size=2,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": PARTLY,
            },
        ),
        ["eager"],
    ),
    "mpt": (
        lambda: transformers.MptConfig(
            vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=3, max_seq_len=64, use_cache=True
        ),
        ["eager"],
    ),
    "xglm": (
        lambda: transformers.XGLMConfig(
            vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4,
            max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        ),
        ["eager"],
    ),
}  # fmt: skip
WAYS = [(name, loaded) for name, (_, ways) in MODELS.items() for loaded in ways]
TEXT = kvpolicy.TextLayout(sinks=1, length=64)


def build(name: str, loaded: str = "eager"):
    torch.manual_seed(0)
    config = MODELS[name][0]()
    config.pad_token_id = 0
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=loaded).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2:  # so that attention tells tokens apart
                spread = (
                    2 if any(part in key for part in ("qkv", "q_proj", "k_proj", "query")) else 1
                )
                weight.normal_(0, spread * weight.shape[1] ** -0.5, generator=generator)
    return model


def prompt(padding: int = 0):
    order = torch.rand(2, 59, generator=torch.Generator().manual_seed(3)).argsort(-1)
    ids, mask = 1 + order[:, :PROMPT], torch.ones(2, PROMPT, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def room(model, policy="h2o", budget=60, **options):
    return attach(model, policy=policy, budget=budget, layout=TEXT, **options)


GREEDY = {
    "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True,
    "output_logits": True, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("name", "loaded"), WAYS)
def test_everything_fits_and_nothing_differs(name, loaded, padding):
    model = build(name, loaded)
    for options in [{}, {"output_attentions": True}][: 1 if loaded == "sdpa" else 2]:
        expected = model.generate(**prompt(padding), **GREEDY, **options)
        with room(model) as cache:
            given = model.generate(**prompt(padding), **GREEDY, **options, **as_argument(cache))
            assert cache.stats().left_alone == ()
            assert cache.stats().seen == PROMPT + NEW - 1
        assert torch.equal(given.sequences, expected.sequences)
        torch.testing.assert_close(
            torch.stack(given.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4
        )
    if loaded == "sdpa":  # with weights, Falcon adds sdpa's bool mask to its scores as a number
        return
    for step, (mine, theirs) in enumerate(zip(given.attentions, expected.attentions, strict=True)):
        for layer, weights in enumerate(mine):
            live = slice(padding if step == 0 else 0, None)  # rows of padding mean nothing
            torch.testing.assert_close(
                weights[:, :, live], theirs[layer][:, :, live], atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize(("name", "loaded"), WAYS)
def test_what_was_evicted_is_gone_and_nothing_else(name, loaded):
    model = build(name, loaded)
    # XGLM takes one mask for all heads.
    policy = "streaming_llm" if name == "xglm" else "h2o"
    with room(model, policy, BUDGET) as cache:
        parts = slow_reference.texts(30).split([6, *[1] * 24], 1)
        given, held = slow_reference.under_policy(model, cache, parts)
        assert max(cache.stats().peak_tokens) == 1 + BUDGET
        assert min(cache.stats().evictions) == 30 - 1 - BUDGET
    modules = own_attention(model)
    if name == "xglm":
        held = [[layer[:, :1] for layer in step] for step in held]
    slow_reference.check(model, modules, parts, given, held)


@pytest.mark.parametrize("name", MODELS)
def test_several_tokens_at_once_are_what_they_are_one_by_one(name):
    model = build(name)
    ids = slow_reference.texts(30)
    results = []
    for sizes in ([6, 11, 13], [6, *[1] * 24]):
        with torch.inference_mode(), room(model, "h2o", BUDGET) as cache:
            parts = [model(part, **as_argument(cache)).logits for part in ids.split(sizes, 1)]
            results.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_beams(name):
    model = build(name)
    options = {"num_beams": 3, "max_new_tokens": 10, "pad_token_id": 0}
    expected = model.generate(**prompt(2), **options)
    with room(model) as cache:
        assert torch.equal(model.generate(**prompt(2), **options, **as_argument(cache)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_other_calls_and_the_object_are_as_before(name):
    model = build(name)
    before = {id(module): dict(vars(module)) for module in model.modules()}
    expected = model.generate(**prompt(), **GREEDY).logits
    first, second = room(model), room(model)
    first.__enter__()
    cache = second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(
        torch.stack(model.generate(**prompt(), **GREEDY).logits), torch.stack(expected)
    )
    model.generate(**prompt(), **GREEDY, **as_argument(cache))  # the second block is open
    second.__exit__(None, None, None)
    assert {id(module): dict(vars(module)) for module in model.modules()} == before


def test_keys_that_query_heads_share_are_cached_once():
    """Which transformers' own cache does not do."""
    model = build("falcon, shared keys")
    with room(model) as cache:
        model.generate(**prompt(), **GREEDY, **as_argument(cache))
    assert cache.positions(0).shape[1] == 2
    own = transformers.DynamicCache(config=model.config)
    model.generate(**prompt(), **GREEDY, **as_argument(own))
    assert own.layers[0].keys.shape[1] == 4


def test_a_compiled_step_is_refused():
    model = build("bloom")
    with (
        room(model) as cache,
        pytest.raises(kvpolicy.ParameterError, match="computes its attention itself"),
        compile_decode(model, cache),
    ):
        pass


def test_a_class_that_somebody_derived_is_not_taken_for_its_base():
    """It may compute something else."""
    derived = type("BloomAttention", (type(own_attention(build("bloom"))[0]),), {})
    model = build("bloom")
    model.transformer.h[1].self_attention.__class__ = derived
    with (
        pytest.raises(kvpolicy.ModelError, match="keys of layer 1 never came"),
        room(model) as cache,
    ):
        model.generate(**prompt(), **GREEDY, **as_argument(cache))


def test_a_model_that_drops_the_cache_is_found():
    model = build("mpt")

    def forgets(model, input_ids, *args, **kwargs):
        model(input_ids, **as_argument(cache))
        return model(input_ids)

    with room(model) as cache, pytest.raises(kvpolicy.ModelError, match="attended without it"):
        model.generate(**prompt(), custom_generate=forgets, **as_argument(cache))
