"""What transformers expects of a cache holds for ours: on text and images, in full and evicting."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.turns import in_turn
from torch.nn import functional

import kvpolicy
import kvpolicy_adapters

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

VOCAB = tiny_models.VOCAB
NEW = 14
IMAGE = kvpolicy.RasterLayout(rows=6, cols=5, prefix=6)
TEXT = kvpolicy.TextLayout(sinks=1, length=36, line_length=5)
MODELS = ["llama", "gpt2"]
LAYOUTS = {"image": IMAGE, "text": TEXT}
BUDGET = 13
EVERY = kvpolicy.available()
EVICTING = [name for name in EVERY if name != "full"]


def pairwise(cases, *, layouts_only=False):
    """Each case on each model and on each layout, and each of these with the other; not all three.

    What a policy does, how a model calls and where tokens lie do not know of each other.
    """
    fixtures, models = (("layout",), ()) if layouts_only else (("model", "layout"), (MODELS,))
    return pytest.mark.parametrize(
        ("case", *fixtures),
        in_turn(cases, *models, turn=list(LAYOUTS)),
        indirect=fixtures,
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
    )


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return getattr(tiny_models, request.param)()


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def attach(model, layout, name="h2o", budget=BUDGET, **options):
    return kvpolicy_adapters.attach(
        model, policy=tiny_models.policy(name), budget=budget, layout=layout, **options
    )


def prompts(batch: int = 2, length: int = 6, seed: int = 3) -> torch.Tensor:
    """Tokens that differ within a row: equal ones have keys of equal length, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.rand(batch, VOCAB - 1, generator=generator).argsort(-1)[:, :length]


def generate(model, tokens, cache=None, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False} | options
    settings.setdefault("attention_mask", torch.ones_like(tokens))
    if cache is not None:
        settings |= cache.as_argument
    torch.manual_seed(7)
    return model.generate(tokens, **settings)


def one_by_one(model, tokens, cache) -> torch.Tensor:
    """Logits of every token, each cached alone behind the first six."""
    parts = [tokens[:, :6], *tokens[:, 6:].split(1, dim=1)]
    with torch.inference_mode():
        return torch.cat([model(part, **cache.as_argument).logits for part in parts], dim=1)


DRAW = {"do_sample": True, "top_k": 0}
MODES = {
    "greedy": {},
    "sampling": DRAW | {"temperature": 1.3, "top_p": 0.9},
    "several": DRAW | {"num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": DRAW | {"num_beams": 3, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
}


# -- at full budget: what the model's own cache gives ----------------------------------------------


@pairwise([(f, m) for f in ("llama", "mistral", "gpt2") for m in MODES], layouts_only=True)
def test_generate_gives_what_the_models_own_cache_gives(case, layout):
    family, mode = case
    model = getattr(tiny_models, family)()
    expected = generate(model, prompts(), **MODES[mode])
    for name in ("linear", "streaming_llm", "tova"):
        with attach(model, layout, name, "1/1") as cache:
            assert torch.equal(generate(model, prompts(), cache, **MODES[mode]), expected), name


@pairwise(EVERY, layouts_only=True)
def test_every_policy_follows_beams_and_chunks(llama, layout, case):
    for mode in ("sampled beams", "chunked prefill"):
        expected = generate(llama, prompts(), **MODES[mode])
        with attach(llama, layout, case, "1/1") as cache:
            assert torch.equal(generate(llama, prompts(), cache, **MODES[mode]), expected), mode


def test_generate_from_embeddings(model, layout):
    tokens = prompts()
    embedded = model.get_input_embeddings()(tokens)
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(inputs_embeds=embedded, **options)
    with attach(model, layout, "linear", "1/1") as cache:
        out = model.generate(inputs_embeds=embedded, **cache.as_argument, **options)
    assert torch.equal(out, expected)


# -- continuing, resetting, choosing ---------------------------------------------------------------


@pairwise([*((name, "1/1") for name in EVERY), *((name, BUDGET) for name in EVICTING)])
def test_a_finished_generation_goes_on_with_the_same_cache(model, layout, case):
    name, budget = case
    with attach(model, layout, name, budget) as cache:
        at_once = generate(model, prompts(), cache, max_new_tokens=28)
        positions = cache.positions(2)
        cache.reset()
        tokens = prompts()
        for more in (9, 1, 18):
            tokens = generate(model, tokens, cache, max_new_tokens=more)
        assert torch.equal(tokens, at_once)
        assert torch.equal(cache.positions(2), positions)
    assert (sum(cache.stats().evictions) > 0) == (budget == BUDGET)


@pairwise(EVICTING)
def test_a_user_may_add_tokens_between_two_generations(model, layout, case):
    """A chat: the second call brings the answer's last token and several new ones at once."""
    more = prompts(length=7, seed=11)
    with attach(model, layout, case) as cache:
        first = generate(model, prompts(), cache, max_new_tokens=12)
        whole = generate(model, torch.cat([first, more], dim=1), cache, max_new_tokens=6)
        held = [cache.positions(layer).sort().values for layer in range(3)]
        cache.reset()
        logits = one_by_one(model, whole[:, :-1], cache)
        assert torch.equal(logits[:, -6:].argmax(-1), whole[:, -6:])
        for layer in range(3):
            assert torch.equal(cache.positions(layer).sort().values, held[layer])
    assert min(cache.stats().evictions) > 0


def test_only_the_new_tokens_may_be_passed(llama, layout):
    """As transformers has it: ids of the new tokens, and a mask over the whole sequence."""
    more = prompts(length=4, seed=11)
    answers = []
    for whole in (True, False):
        with attach(llama, layout, "linear") as cache:
            first = generate(llama, prompts(), cache, max_new_tokens=12)
            both = torch.cat([first, more], dim=1)
            mask = torch.ones_like(both)
            tokens = both if whole else both[:, 17:]
            out = generate(llama, tokens, cache, max_new_tokens=6, attention_mask=mask)
            answers.append(out[:, -6:])
    assert torch.equal(*answers)


@pairwise(EVICTING)
def test_a_cache_that_was_reset_is_as_new(model, layout, case):
    with attach(model, layout, case) as cache:
        expected = generate(model, prompts(3), cache, max_new_tokens=24)
        stats = cache.stats()
    with attach(model, layout, case) as cache:
        generate(model, prompts(2, seed=8), cache, max_new_tokens=20)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(model, prompts(3), cache, max_new_tokens=24), expected)
        assert cache.stats() == stats
    assert min(stats.evictions) > 0


@pairwise(EVICTING)
def test_chosen_and_repeated_sequences_go_on_as_they_would_alone(model, layout, case):
    tokens = prompts(3, 30)

    def alone(row: int) -> torch.Tensor:
        with attach(model, layout, case) as cache:
            return one_by_one(model, tokens[row : row + 1], cache)[:, 22:]

    expected = torch.cat([alone(row) for row in (2, 2, 0)])
    with torch.inference_mode(), attach(model, layout, case) as cache:
        for part in (tokens[:, :6], *tokens[:, 6:22].split(1, dim=1)):
            model(part, **cache.as_argument)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 2, 0]))
        parts = tokens[[2, 2, 0], 22:].split(1, dim=1)
        logits = torch.cat([model(part, **cache.as_argument).logits for part in parts], dim=1)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_several_new_tokens_at_once_give_what_one_by_one_gives(model, layout):
    tokens = prompts(2, 36)
    for turn, name in enumerate(EVICTING):
        reclaim = ("lazy", "eager")[(turn + (layout is TEXT)) % 2]
        with attach(model, layout, name, reclaim=reclaim) as cache:
            expected = one_by_one(model, tokens, cache)
            held = [cache.positions(layer).sort().values for layer in range(3)]
        assert min(cache.stats().evictions) > 0
        with torch.inference_mode(), attach(model, layout, name, reclaim=reclaim) as cache:
            parts = tokens.split([6, 9, 1, 17, 3], dim=1)
            logits = torch.cat([model(part, **cache.as_argument).logits for part in parts], dim=1)
            torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-5)
            for layer in range(3):
                assert torch.equal(cache.positions(layer).sort().values, held[layer])


# -- evicting: each returned sequence is what it would have been alone -----------------------------


SEVERAL = ("several", "beams", "several beams", "sampled beams")


@pairwise([(n, m) for i, n in enumerate(EVICTING) for m in SEVERAL[i % 2 :]], layouts_only=True)
def test_returned_sequences_carry_their_own_decisions(llama, layout, case):
    """The scores that generate reports are those of each sequence, decoded on its own.

    No token comes twice in a sequence: in the first layer the keys of equal ones have one length,
    but for the last bits of a product, which differ with how many rows go by at once on some
    processors; and ``knorm`` would decide by them.
    """
    options = {"max_new_tokens": 24, "output_scores": True, "return_dict_in_generate": True}
    options["no_repeat_ngram_size"] = 1
    name, mode = case
    mode = MODES[mode] | ({"top_k": 0, "top_p": 1.0} if "do_sample" in MODES[mode] else {})
    with attach(llama, layout, name) as cache:
        out = generate(llama, prompts(), cache, **options, **mode)
        assert min(cache.stats().evictions) > 0
        assert max(cache.stats().peak_tokens) <= layout.prefix + max(cache.stats().budgets)
    reported = llama.compute_transition_scores(
        out.sequences, out.scores, getattr(out, "beam_indices", None), normalize_logits=True
    )
    with attach(llama, layout, name) as cache:
        logits = one_by_one(llama, out.sequences[:, :-1], cache)[:, 5:]
    came = functional.one_hot(out.sequences[:, :-1], VOCAB).cumsum(1)[:, 5:] > 0
    logits = logits.masked_fill(came, -torch.inf)
    alone = logits.log_softmax(-1).gather(2, out.sequences[:, 6:, None])[..., 0]
    torch.testing.assert_close(reported, alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EVICTING)
def test_a_prompt_in_chunks_under_eviction(llama, layout, name):
    """An image's prompt is pinned, so chunks change nothing; chunks of a text hold the budget."""
    long = prompts(length=6 if layout is IMAGE else 30)
    with attach(llama, layout, name) as cache:
        out = generate(llama, long, cache, prefill_chunk_size=4, max_new_tokens=6)
        assert max(cache.stats().peak_tokens) <= layout.prefix + max(cache.stats().budgets)
        assert cache.get_seq_length() == out.shape[1] - 1
        cache.reset()
        if layout is IMAGE:
            expected = generate(llama, long, cache, max_new_tokens=6)
            assert torch.equal(out, expected)
            return
        with torch.inference_mode():
            for part in long.split(4, dim=1):
                logits = llama(part, **cache.as_argument).logits
            for token in out[:, 30:].split(1, dim=1):
                assert torch.equal(logits[:, -1:].argmax(-1), token)
                logits = llama(token, **cache.as_argument).logits


# -- plain forward calls ---------------------------------------------------------------------------


def test_forward_gives_the_cache_back_and_counts_tokens(model, layout):
    with torch.inference_mode(), attach(model, layout, "linear") as cache:
        out = model(prompts(), **cache.as_argument)
        assert cache in out.values()
        assert cache.get_seq_length() == 6
        out = model(prompts(length=20), **cache.as_argument, use_cache=True)
        assert cache.get_seq_length() == 26
        assert cache.get_max_length() == 36
        assert len(cache) == 3
        assert cache.positions(0).shape[-1] == layout.prefix + BUDGET


def test_explicit_positions_are_the_models_own_affair(model, layout):
    tokens = prompts(2, 12)
    places = torch.arange(12).expand(2, 12)
    with torch.inference_mode(), attach(model, layout, "linear", "1/1") as cache:
        expected = model(tokens).logits
        parts = zip(tokens.split(5, dim=1), places.split(5, dim=1), strict=True)
        logits = [model(part, position_ids=at, **cache.as_argument).logits for part, at in parts]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)
