"""No silent no-op: whichever way a model generates, the policy saw every token or an error came."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support import tiny_models

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.transformers.cache_argument import CACHE_ARGUMENT, as_argument

BUDGET, PROMPT, NEW = 8, 6, 20
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompt(batch: int = 2) -> torch.Tensor:
    return (
        1
        + torch.rand(batch, 60, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :PROMPT]
    )


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture
def cache(model):
    layout = kvpolicy.TextLayout(sinks=1)
    with attach(model, policy="h2o", budget=BUDGET, layout=layout) as attached:
        yield attached


def check_all_seen(cache, sequences: torch.Tensor) -> None:
    """All but the newest token, which nothing has come behind."""
    stats = cache.stats()
    assert stats.seen == sequences.shape[1] - 1 >= PROMPT
    assert stats.peak_tokens == (1 + BUDGET,) * 3
    assert stats.evictions == (stats.seen - 1 - BUDGET,) * 3


# -- ways that are served --------------------------------------------------------------------------


class Collector(transformers.generation.BaseStreamer):
    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        pass


def greedily_by_hand(model, input_ids, logits_processor, stopping_criteria, **kwargs):
    """A decoding loop of the user's own, which generate prepares."""
    config = kwargs.pop("generation_config")
    cache = kwargs.pop(CACHE_ARGUMENT)
    given = input_ids
    while input_ids.shape[1] < config.max_length:
        logits = model(given, **as_argument(cache)).logits[:, -1]
        given = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, given], dim=1)
    return input_ids


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling with top-k, top-p, temperature": {
        "do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7,
    },
    "beams": {"num_beams": 3},
    "beams that return several": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "a loop of one's own": {"custom_generate": greedily_by_hand},
    "a dictionary of results": {"return_dict_in_generate": True, "output_logits": True},
    "weights": {"return_dict_in_generate": True, "output_attentions": True},
    "a prompt in chunks": {"prefill_chunk_size": 3},
    "a repetition penalty": {"repetition_penalty": 1.3},
    "a configuration": {"generation_config": transformers.GenerationConfig(**GREEDY)},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_token_comes_to_the_policy(model, cache, way):
    output = model.generate(prompt(), **GREEDY | WAYS[way] | as_argument(cache))
    check_all_seen(cache, getattr(output, "sequences", output))


@pytest.mark.parametrize("way", ["an assistant model", "prompt lookup"])
def test_candidates(model, cache, way):
    """One sequence, as transformers has it; wrong candidates leave nothing behind."""
    helper = {"prompt_lookup_num_tokens": 3}
    if way == "an assistant model":
        helper = {"assistant_model": tiny_models.llama(seed=2)}
    twice = prompt(1).repeat(1, 2)
    check_all_seen(cache, model.generate(twice, **GREEDY, **helper, **as_argument(cache)))


def test_streamers(model, cache):
    streamer = Collector()
    out = model.generate(prompt(1), streamer=streamer, **GREEDY, **as_argument(cache))
    check_all_seen(cache, out)
    assert len(streamer.pieces) == 1 + NEW


def test_embeddings_instead_of_ids(model, cache):
    embedded = model.get_input_embeddings()(prompt())
    new = model.generate(inputs_embeds=embedded, **GREEDY, **as_argument(cache))
    assert new.shape == (2, NEW)
    assert cache.stats().seen == PROMPT + NEW - 1


def test_pipelines(model, cache):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer(
        pytest.importorskip("tokenizers").models.WordLevel(
            {f"w{n}": n for n in range(60)}, unk_token="w0"
        )
    )
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer.pre_tokenizer = WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w0"
    )
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=wrapped, device="cpu")
    pipe("w1 w2 w3 w4 w5 w6", max_new_tokens=NEW, do_sample=False, **as_argument(cache))
    assert cache.stats().seen == PROMPT + NEW - 1
    assert cache.stats().peak_tokens == (1 + BUDGET,) * 3


def contrastively(model, ids, cache, one_by_one=False, candidates=4, penalty=0.6, new=12):
    """Contrastive search (arXiv:2202.06417): candidates are rows beside each other, or copies."""
    output = model(ids, output_hidden_states=True, **as_argument(cache))
    context, logits = output.hidden_states[-1], output.logits[:, -1]
    for _ in range(new):
        likely, tokens = logits.softmax(-1).topk(candidates)
        if one_by_one:
            copies = [copy.deepcopy(cache) for _ in range(candidates)]
            outputs = [
                model(tokens[:, n : n + 1], output_hidden_states=True, **as_argument(copies[n]))
                for n in range(candidates)
            ]
            hidden = torch.stack([o.hidden_states[-1][:, -1] for o in outputs], 1)
            scores = torch.stack([o.logits[:, -1] for o in outputs], 1)
        else:
            cache.batch_repeat_interleave(candidates)
            output = model(tokens.view(-1, 1), output_hidden_states=True, **as_argument(cache))
            hidden = output.hidden_states[-1][:, -1].unflatten(0, (-1, candidates))
            scores = output.logits[:, -1].unflatten(0, (-1, candidates))
        alike = torch.cosine_similarity(context[:, None], hidden[:, :, None], dim=-1).amax(-1)
        best = ((1 - penalty) * likely - penalty * alike).argmax(-1)
        rows = torch.arange(len(ids))
        if one_by_one:
            cache = copies[int(best)]
        else:
            cache.batch_select_indices(rows * candidates + best)
        context = torch.cat([context, hidden[rows, best][:, None]], 1)
        ids = torch.cat([ids, tokens[rows, best][:, None]], 1)
        logits = scores[rows, best]
    return ids, cache


def test_contrastive_search(model, cache):
    """Its loop, as transformers' community has it: repeat the cache, and keep some rows of it."""
    with torch.inference_mode():
        plain, _ = contrastively(model, prompt(), transformers.DynamicCache())
        layout = kvpolicy.TextLayout(sinks=1, length=40)
        with attach(model, policy="h2o", budget="1/1", layout=layout) as room:
            assert torch.equal(contrastively(model, prompt(), room)[0], plain)
        tokens, _ = contrastively(model, prompt(), cache)
        assert cache.stats().seen == tokens.shape[1] == PROMPT + 12
        assert cache.stats().peak_tokens == (1 + BUDGET,) * 3
        for row in range(2):
            cache.reset()
            alone = contrastively(model, prompt()[row : row + 1], cache, one_by_one=True)[0]
            assert torch.equal(tokens[row : row + 1], alone)


def test_plain_calls(model, cache):
    tokens = prompt()
    with torch.inference_mode():
        for _ in range(NEW):
            new = tokens[:, cache.get_seq_length() :]
            # Without use_cache, too: the cache that is given is used.
            logits = model(new, use_cache=False, **as_argument(cache)).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    check_all_seen(cache, tokens)


def test_a_second_turn_that_begins_with_the_first(model, cache):
    first = model.generate(prompt(), **GREEDY, **as_argument(cache))
    more = torch.cat([first, prompt()], dim=1)
    check_all_seen(cache, model.generate(more, **GREEDY, **as_argument(cache)))


# -- ways that are refused -------------------------------------------------------------------------


def phi3():
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 32,
        },
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.Phi3ForCausalLM(config).eval()


def test_a_model_that_drops_the_cache_is_found_where_it_does():
    """Phi-3 does where its rotation changes, and goes on with a cache of its own."""
    model = phi3()
    with (
        attach(model, policy="h2o", budget=12, layout=kvpolicy.TextLayout()) as cache,
        pytest.raises(kvpolicy.ModelError, match=r"attended without it at token 32.*Phi-3"),
    ):
        model.generate(prompt(), **GREEDY | {"max_new_tokens": 60} | as_argument(cache))


def test_a_model_that_keeps_the_cache_stays_within_its_first_rotation():
    model = phi3()
    with attach(model, policy="h2o", budget=12, layout=kvpolicy.TextLayout()) as cache:
        model.generate(prompt(), **GREEDY, **as_argument(cache))
    assert cache.stats().seen == PROMPT + NEW - 1


REFUSED = {
    "use_cache=False": ({"use_cache": False}, "nothing for a policy to evict"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_goes_past_the_policy_is_refused(model, cache, way):
    options, said = REFUSED[way]
    with pytest.raises(kvpolicy.KVPolicyError, match=said):
        model.generate(prompt(1), **GREEDY | options | as_argument(cache))


def test_transformers_refuses_two_caches(model, cache):
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(prompt(1), cache_implementation="static", **GREEDY, **as_argument(cache))


def test_continuous_batching_is_refused(model, cache):
    with pytest.raises(kvpolicy.ParameterError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])


def test_a_used_cache_and_another_prompt(model, cache):
    """transformers would drop as many tokens of it as the cache has seen, unread."""
    model.generate(prompt(), **GREEDY, **as_argument(cache))
    other = (prompt() % 50 + 7).repeat(1, 6)
    with pytest.raises(kvpolicy.CacheStateError, match="another one from position 0 on"):
        model.generate(other, **GREEDY, **as_argument(cache))
    cache.reset()
    check_all_seen(cache, model.generate(prompt(), **GREEDY, **as_argument(cache)))


def test_a_generation_that_never_calls_the_model(model, cache):
    with pytest.raises(kvpolicy.ModelError, match="no token came to it"):
        model.generate(
            prompt(),
            custom_generate=lambda model, ids, *_, **__: ids,
            **GREEDY,
            **as_argument(cache),
        )


def test_calls_without_the_cache_are_nobodys_business(model, cache):
    """Other caches, in the same block, before and after and in between."""
    expected = model.generate(prompt(), **GREEDY)
    model.generate(prompt(), **GREEDY, **as_argument(cache))
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert torch.equal(model.generate(prompt(), use_cache=False, **GREEDY), expected)


def test_the_object_has_its_own_methods_again():
    model = tiny_models.llama()
    before = dict(vars(model))
    first = attach(model, policy="h2o", budget=BUDGET, layout=kvpolicy.TextLayout())
    second = attach(model, policy="h2o", budget=BUDGET, layout=kvpolicy.TextLayout())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "generate" in vars(model)  # the second block is open
    second.__exit__(None, None, None)
    assert dict(vars(model)) == before
