"""Text models whose layers are not all alike: windows, soft caps, sinks, borrowed keys, padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvpolicy
import kvpolicy_adapters
from kvpolicy import ModelError
from kvpolicy_adapters.evaluation.sweep.tiny import build as build_tiny
from kvpolicy_adapters.transformers.cache_argument import CACHE_ARGUMENT, as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

VOCAB, NEW = 61, 30
EVICTING = [name for name in kvpolicy.available() if name != "full"]
#: Policies that decide token by token, from the tokens alone: padding changes nothing for them.
BY_TOKEN = ["h2o", "knorm", "streaming_llm", "tova"]
SMALL = {
    "linear": {"anchors": 2},
    "linear2d": {"anchors": 2},
    "pyramid": {"window": 2, "interval": 3, "kernel": 1},
    "snapkv": {"window": 2, "interval": 3, "kernel": 1},
}
BASE = {
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
#: Of each model: the class of its configuration, what differs from BASE, and the layers that a
#: budget of 16 leaves alone.
MODELS = {
    "gemma2: windows and soft caps": (
        "Gemma2Config",
        {"sliding_window": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        (0, 2),
    ),
    "gpt-oss: windows and learned sinks": (
        "GptOssConfig",
        {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        (0, 2),
    ),
    "gemma3n: windows and borrowed keys": (
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 6,
            "intermediate_size": [48] * 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 8,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 6,
        },
        (0, 2, 4, 5),
    ),
    "qwen3-next: linear attention beside attention": (
        "Qwen3NextConfig",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        (0, 1, 2),
    ),
    "mistral: a window larger than the budget": ("MistralConfig", {"sliding_window": 20}, ()),
    "llama4: chunked attention": (
        "Llama4TextConfig",
        {
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "no_rope_layers": [1, 0, 1, 0],
        },
        (0, 2),
    ),
}


def build(name: str):
    kind, changes, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**BASE | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "q_proj" in key or "k_proj" in key:
                weight *= 12
            if key.endswith("sinks"):
                weight.normal_(0, 2)
    return model


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return build(request.param), MODELS[request.param][2]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "q_proj" in key or "k_proj" in key:
                weight *= 12
    return model


def make(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **SMALL.get(name, {}))


def prompt(padding: int = 5):
    torch.manual_seed(1)
    tokens = torch.randint(2, VOCAB, (2, 12))
    mask = torch.ones_like(tokens)
    tokens[0, :padding], mask[0, :padding] = 0, 0
    return tokens, mask


def generate(model, cache=None, new: int = NEW):
    tokens, mask = prompt()
    settings = {} if cache is None else as_argument(cache)
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, **settings
    )


# -- layers that are not all alike -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["h2o", "linear", "streaming_llm"])
def test_lossless_when_it_fits(case, name):
    model, _ = case
    model.set_attn_implementation("eager")  # sdpa of transformers before 5.23 drops soft caps
    layout = kvpolicy.TextLayout(length=64, line_length=4)
    with kvpolicy_adapters.attach(model, policy=make(name), budget=64, layout=layout) as cache:
        out = generate(model, cache)
    assert torch.equal(out, generate(model))


@pytest.mark.parametrize("name", EVICTING)
def test_the_budget_holds_and_stats_say_what_is_left_alone(case, name):
    model, left_alone = case
    layout = kvpolicy.TextLayout(line_length=4)
    with kvpolicy_adapters.attach(model, policy=make(name), budget=16, layout=layout) as cache:
        generate(model, cache)
        stats = cache.stats()
    # Before 5.20, transformers' own cache has no layers for those that borrow keys.
    left_alone = tuple(layer for layer in left_alone if layer < len(stats.budgets))
    assert stats.left_alone == left_alone
    managed = [n for n in range(len(stats.budgets)) if n not in left_alone]
    assert sum(stats.budgets[n] for n in managed) == 16 * len(managed)
    assert all(stats.peak_tokens[n] == stats.budgets[n] for n in managed)
    assert all(stats.evictions[n] > 0 for n in managed)
    for layer in left_alone:
        assert stats.budgets[layer] == stats.evictions[layer] == stats.reports[layer] == 0
        assert stats.peak_tokens[layer] < 8  # what a window of 8 keeps, or nothing
        with pytest.raises(kvpolicy.CacheStateError, match=f"layer {layer} is left alone"):
            cache.positions(layer)
    mine = sum(layer.store.nbytes for layer in cache.policy_cache.layers if layer.store)
    theirs = [cache.layers[n] for n in left_alone]
    kept = [k for layer in theirs for k in (getattr(layer, "keys", None),) if k is not None]
    assert stats.bytes == mine + 2 * sum(k.nbytes for k in kept)


def test_chunks_equal_one_by_one_under_eviction(case):
    """Windows, caps, sinks and borrowed keys hold inside a call of several tokens as well."""
    model, _ = case
    torch.manual_seed(2)
    tokens = torch.randint(2, VOCAB, (2, 30))

    def run(sizes):
        layout = kvpolicy.TextLayout()
        logits, seen = [], 0
        with (
            torch.inference_mode(),
            kvpolicy_adapters.attach(model, policy="h2o", budget=16, layout=layout) as cache,
        ):
            for size in sizes:
                part = tokens[:, seen : seen + size]
                logits.append(model(part, **as_argument(cache)).logits)
                seen += size
        return torch.cat(logits, dim=1)

    expected = run([16] + [1] * 14)
    torch.testing.assert_close(run([16, 5, 1, 8]), expected, atol=2e-4, rtol=1e-4)


def test_tokens_behind_a_window_go_first():
    """With a window of 20 and a budget of 16, the 16 newest are within it, whatever is observed."""
    model = build("mistral: a window larger than the budget")
    layout = kvpolicy.TextLayout(sinks=2)
    with kvpolicy_adapters.attach(model, policy="h2o", budget=22, layout=layout) as cache:
        assert cache.stats().left_alone == (0, 1, 2, 3)
    with kvpolicy_adapters.attach(model, policy="h2o", budget=17, layout=layout) as cache:
        generate(model, cache)
        seen = cache.policy_cache.seen
        for layer in range(4):
            held = cache.positions(layer)
            # A pinned sink that no query will see again makes room as well.
            assert (held[held >= 0] > seen - 1 - 20).all()


def test_a_window_within_the_capacity_of_its_own_accord_is_lossless():
    """Evicting what lies behind the window changes nothing, so all of it is what goes."""
    torch.manual_seed(0)
    length, window = 40, 12
    query, key, value = torch.randn(3, 1, 2, length, 8)
    turn = torch.arange(length)
    seen_by = (turn[None] <= turn[:, None]) & (turn[None] > turn[:, None] - window)
    expected, _ = kvpolicy.attend(query, key, value, visible=seen_by[None, None])
    layout = kvpolicy.RasterLayout(rows=10, cols=4)
    cache = kvpolicy.PolicyCache("knorm", 11, layout=layout, num_layers=1, windows=[12])
    full = kvpolicy.PolicyCache("knorm", 12, layout=layout, num_layers=1)
    layer = full.layers[0]  # windows=[12] would leave it alone
    layer.plan = layer.decider.plan = dataclasses.replace(layer.plan, window=window)
    outputs = [
        full.attend(
            0,
            *(x[:, :, t : t + 1] for x in (query, key, value)),
            visible=seen_by[None, None, t : t + 1, : t + 1],
        )
        for t in range(length)
    ]
    torch.testing.assert_close(torch.cat(outputs, 2), expected, atol=1e-5, rtol=1e-5)
    assert cache.stats().left_alone == ()
    left = kvpolicy.PolicyCache("knorm", 12, layout=layout, num_layers=2, windows=[12, None])
    assert left.stats().left_alone == (0,)
    assert left.stats().budgets == (0, 12)
    with pytest.raises(kvpolicy.CacheStateError, match="layer 0 is left alone"):
        left.attend(0, query, key, value)


# -- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, 5, 11])
@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_padded_sequence_decides_as_it_does_alone(llama, name, padding):
    torch.manual_seed(3)
    # No token twice: the same token has keys of the same norm, and rounding would break the tie.
    tokens = torch.stack([torch.randperm(VOCAB - 2)[:42] + 2 for _ in range(2)])
    mask = torch.ones_like(tokens)
    tokens[0, :padding], mask[0, :padding] = 0, 0
    layout = kvpolicy.TextLayout(sinks=2)

    def run(tokens, mask):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits, ends = [], [tokens.shape[1] - 30 + n for n in range(31)]
        with (
            torch.inference_mode(),
            kvpolicy_adapters.attach(llama, policy=name, budget=8, layout=layout) as cache,
        ):
            for seen, upto in zip([0, *ends], ends, strict=False):
                part = slice(seen, upto)
                out = llama(
                    tokens[:, part],
                    attention_mask=mask[:, :upto],
                    position_ids=places[:, part],
                    **as_argument(cache),
                )
                logits.append(out.logits[:, -1])
            held = [cache.positions(layer) for layer in range(4)]
        return torch.stack(logits, dim=1), held

    together, held = run(tokens, mask)
    alone, held_alone = run(tokens[:1, padding:], mask[:1, padding:])
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    for mine, other in zip(held, held_alone, strict=True):
        own = torch.where(mine[:1] >= 0, mine[:1] - padding, mine[:1])
        assert torch.equal(own.sort(-1).values, other.sort(-1).values)
    # The sinks are the first two tokens of the text, not of its padding.
    assert (held[0][0] == padding).any(-1).all()
    assert (held[0][0] == padding + 1).any(-1).all()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_padding_is_found_in_a_prompt_that_comes_in_chunks(llama, size):
    tokens, mask = prompt(5)
    layout = kvpolicy.TextLayout(sinks=2)
    with (
        torch.inference_mode(),
        kvpolicy_adapters.attach(llama, policy="h2o", budget=20, layout=layout) as cache,
    ):
        for seen in range(0, 12, size):
            upto = min(seen + size, 12)
            places = (mask[:, :upto].cumsum(-1) - 1).clamp(min=0)[:, seen:upto]
            llama(
                tokens[:, seen:upto],
                attention_mask=mask[:, :upto],
                position_ids=places,
                **as_argument(cache),
            )
        start = cache.policy_cache.layers[0].store.start
        assert start.tolist() == [5, 0]
        assert cache.policy_cache.layers[0].seen == 12


def test_padding_follows_its_sequence():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 6, 8)
    visible = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6).clone()
    visible[1, :, :, :3] = False
    cache = kvpolicy.PolicyCache("h2o", 8, layout=kvpolicy.TextLayout(sinks=1), num_layers=1)
    cache.attend(0, query, key, value, visible=visible)
    assert cache.layers[0].store.start.tolist() == [0, 3]
    cache.select_batch(torch.tensor([1, 1, 0]))
    assert cache.layers[0].store.start.tolist() == [3, 3, 0]
    cache.reset()
    cache.attend(0, query, key, value)
    assert cache.layers[0].store.start is None


# -- models that can't be served -------------------------------------------------------------------

REFUSED = {
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1)
        ),
        "T5ForConditionalGeneration is an encoder-decoder.*decoder-only",
    ),
    "state space": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)
        ),
        "MambaForCausalLM keeps a recurrent state.*models with attention layers",
    ),
    "attention of its own": (
        lambda: transformers.RoFormerForCausalLM(
            transformers.RoFormerConfig(
                vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16, is_decoder=True,
            )
        ),
        "RoFormerForCausalLM does not use transformers' attention interface.*PolicyCache",
    ),
    "an index beside keys and values": (
        lambda: build_tiny("Qwen4ExpForCausalLM"),
        "Qwen4ExpForCausalLM: layer 1 keeps a DynamicIndexedLayer.*keys and values per head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_served_is_refused_by_name_and_reason(kind):
    make_model, message = REFUSED[kind]
    model = make_model()
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=message), kvpolicy_adapters.attach(model, budget=8):
        pass
    assert model.config._attn_implementation == before


def test_attention_that_never_comes_is_found_in_the_first_pass(llama, monkeypatch):
    """A model that changes its keys behind the cache would attend to the new tokens only."""
    attention = type(llama.model.layers[0].self_attn)
    forward = attention.forward

    def copies(self, *args, **kwargs):
        cache = kwargs[CACHE_ARGUMENT]

        class Copy:
            def update(self, keys, values, *rest, **more):
                keys, values = cache.update(keys, values, *rest, **more)
                return keys * 1.0, values

        return forward(self, *args, **kwargs | {CACHE_ARGUMENT: Copy()})

    monkeypatch.setattr(attention, "forward", copies)
    layout = kvpolicy.TextLayout()
    with (
        kvpolicy_adapters.attach(llama, policy="h2o", budget=8, layout=layout) as cache,
        pytest.raises(ModelError, match="keys of layer 0 never came to the policy's attention"),
    ):
        llama(prompt()[0], **as_argument(cache))
