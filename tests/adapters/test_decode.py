"""decode: every family draws with a decoder what its own generate draws, guided and by its grammar.

Greedily, because then whatever draws the same distribution draws the same tokens.
"""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

import test_chameleon as chameleon  # noqa: E402
import test_emu3 as emu3  # noqa: E402
import test_janus as janus  # noqa: E402
import test_llamagen as llamagen  # noqa: E402
from support import llamagen_standin, tiny_models  # noqa: E402

import kvpolicy  # noqa: E402
from kvpolicy import CacheStateError, LayoutError, ParameterError, Sampling  # noqa: E402
from kvpolicy_adapters import attach, decode  # noqa: E402
from kvpolicy_adapters.images.chameleon import (  # noqa: E402
    ImageChameleon,
    ImageGrammar,
    ImageGuidance,
)
from kvpolicy_adapters.images.emu3 import GridRule  # noqa: E402
from kvpolicy_adapters.images.guidance import Guidance  # noqa: E402

GREEDY = Sampling(temperature=0.0)
DECODERS = ["sequential", "sjd:window=5", "sjd:window=12:draft=left:coupled=false"]
POLICIES = ["linear", "h2o", "full"]


def make(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **({"anchors": 3} if name == "linear" else {}))


def under(model, name, budget, **options):
    budget = None if name == "full" else budget
    return attach(model, policy=make(name), budget=budget, **options)


# -- any causal language model -------------------------------------------------------------------

GRID = kvpolicy.RasterLayout(rows=6, cols=6, prefix=4)
PROMPT = torch.tensor([[0, 7, 8, 9], [4, 5, 6, 7]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


def generated(model, cache, **options):
    return model.generate(
        PROMPT,
        attention_mask=MASK,
        **cache.as_argument,
        max_new_tokens=36,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_padded_batch_of_a_language_model(llama, name, decoder):
    with under(llama, name, 16, layout=GRID) as cache:
        expected = generated(llama, cache)
    with under(llama, name, 16, layout=GRID) as cache:
        drawn = decode(
            llama, PROMPT, cache, 36, decoder=decoder, attention_mask=MASK, sampling=GREEDY
        )
        assert cache.stats().seen == 39
    assert torch.equal(drawn.tokens, expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_guidance_has_a_cache_of_its_own(llama, decoder):
    negative = torch.tensor([[3, 9, 9, 9, 9, 2]])

    def caches():
        return under(llama, "linear", 16, layout=GRID), attach(
            llama,
            policy="h2o",
            budget=16,
            layout=kvpolicy.RasterLayout(rows=6, cols=6, prefix=6),
        )

    first, second = caches()
    with first as cache, second as other:
        guide = Guidance(2.0, llama, other, negative)
        expected = generated(llama, cache, logits_processor=[guide])
    first, second = caches()
    with first as cache, second as other:
        drawn = decode(
            llama,
            PROMPT,
            cache,
            36,
            decoder=decoder,
            attention_mask=MASK,
            guidance=Guidance(2.0, llama, other, negative),
            sampling=GREEDY,
        )
        assert other.stats().seen == 6 + 35
    assert torch.equal(drawn.tokens, expected)


def test_sampling_cuts_as_transformers_does():
    chance = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 40, generator=chance) * 3
    scores[:, 7] = scores[:, 3]  # equals
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 9, 0.6), (1.0, 0, 0.9)):
        warped = transformers.TemperatureLogitsWarper(temperature)(None, scores)
        if top_k:
            warped = transformers.TopKLogitsWarper(top_k)(None, warped)
        if top_p < 1:
            warped = transformers.TopPLogitsWarper(top_p)(None, warped)
        ours = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(scores)
        torch.testing.assert_close(ours, warped.softmax(-1))
        assert torch.equal(ours > 0, warped > -torch.inf)


def test_suppressed_tokens_never_come(llama):
    with under(llama, "linear", 16, layout=GRID) as cache:
        drawn = decode(
            llama, PROMPT, cache, 36, decoder="sjd:window=6", suppress_tokens=range(20, 61), seed=0
        )
    assert int(drawn.tokens[:, 4:].max()) < 20


def test_a_seed_makes_it_repeatable(llama):
    def draw(seed):
        with under(llama, "linear", 16, layout=GRID) as cache:
            return decode(llama, PROMPT, cache, 36, decoder="sjd:window=6", seed=seed).tokens

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# -- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_llamagen(decoder, scale):
    model = llamagen.own(llamagen.standin("c2i"))
    classes = torch.tensor([3, 5])

    def draw(**options):
        with under(model, "linear", 18) as cache:
            return model.generate(
                classes, cfg_scale=scale, cfg_interval=12, do_sample=False, cache=cache, **options
            )

    assert torch.equal(draw(decoder=decoder), draw())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_llamagens_own_object(kind, decoder):
    model = llamagen.standin(kind)
    condition, mask = torch.tensor([3, 5]), None
    if kind == "t2i":
        condition = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with under(model, "linear", 18) as cache:
        expected = llamagen_standin.generate(
            model, condition, 36, emb_masks=mask, cfg_scale=3.0, sample_logits=False
        )
    with under(model, "linear", 18) as cache:
        drawn = decode(
            model,
            condition,
            cache,
            36,
            decoder=decoder,
            attention_mask=mask,
            guidance=3.0,
            sampling=GREEDY,
        )
    assert torch.equal(drawn.tokens, expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_janus(decoder):
    model, prompt = janus.tiny(), torch.tensor([[0, 1, 9, 8, 3], [1, 7, 6, 5, 3]])
    mask = (prompt != janus.PAD).long()
    with under(model, "linear", 18) as cache:
        expected = model.generate(
            prompt,
            attention_mask=mask,
            generation_mode="image",
            guidance_scale=3.0,
            do_sample=False,
            **cache.as_argument,
        )
    with under(model, "linear", 18) as cache:
        drawn = decode(
            model,
            prompt,
            cache,
            36,
            decoder=decoder,
            attention_mask=mask,
            guidance=3.0,
            sampling=GREEDY,
        )
    assert torch.equal(drawn.tokens[:, 5:], expected)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", POLICIES)
def test_lumina_with_its_grammar_and_guidance(name, decoder):
    model = ImageChameleon.sharing(chameleon.tiny())
    new = chameleon.IMAGE + 1
    with under(model, name, 20) as cache, under(model, name, 20) as second:
        guide = ImageGuidance(3.0, model, second)
        expected = chameleon.generate(model, chameleon.PROMPT, cache, guide, new=new)
    with under(model, name, 20) as cache, under(model, name, 20) as second:
        drawn = decode(
            model,
            chameleon.PROMPT,
            cache,
            new,
            decoder=decoder,
            guidance=ImageGuidance(3.0, model, second),
            rules=[ImageGrammar(model)],
            sampling=GREEDY,
        )
    assert torch.equal(drawn.tokens, expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_emu3_with_its_grammar_and_guidance(decoder):
    model = emu3.tiny()
    mask = (emu3.PROMPTS != emu3.PAD).long()
    rule = transformers.PrefixConstrainedLogitsProcessor(GridRule(model), 1)

    def options(second):
        return Guidance(3.0, model, second, emu3.NEGATIVE)

    with under(model, "linear", 20) as cache, under(model, "linear", 20) as second:
        expected = model.generate(
            emu3.PROMPTS,
            attention_mask=mask,
            **cache.as_argument,
            max_new_tokens=emu3.NEW,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[options(second), rule],
        )
    with under(model, "linear", 20) as cache, under(model, "linear", 20) as second:
        drawn = decode(
            model,
            emu3.PROMPTS,
            cache,
            emu3.NEW,
            decoder=decoder,
            attention_mask=mask,
            guidance=options(second),
            rules=[rule],
            sampling=GREEDY,
        )
    assert torch.equal(drawn.tokens, expected)


# -- what is refused -----------------------------------------------------------------------------


def test_a_used_cache_is_refused(llama):
    with under(llama, "linear", 16, layout=GRID) as cache:
        decode(llama, PROMPT, cache, 3)
        with pytest.raises(CacheStateError, match="holds 6 tokens already"):
            decode(llama, PROMPT, cache, 3)


def test_a_number_of_guidance_needs_a_model_that_doubles(llama):
    with (
        under(llama, "linear", 16, layout=GRID) as cache,
        pytest.raises(ParameterError, match="needs a second cache"),
    ):
        decode(llama, PROMPT, cache, 3, guidance=2.0)


def test_a_second_cache_of_guidance_is_refused_where_the_batch_is_doubled():
    model = janus.tiny()
    with under(model, "linear", 18) as cache, under(model, "linear", 18) as second:
        guide = Guidance(2.0, model, second, PROMPT)
        with pytest.raises(ParameterError, match="give guidance as a number"):
            decode(model, PROMPT, cache, 3, guidance=guide)


def test_llamagen_is_sent_to_its_generate():
    model = llamagen.own(llamagen.standin("c2i"))
    with (
        under(model, "linear", 18) as cache,
        pytest.raises(ParameterError, match=r"model\.generate\(condition, cache=cache"),
    ):
        decode(model, PROMPT, cache, 3)


def test_guidance_of_an_image_that_does_not_begin_behind_the_prompt():
    model = ImageChameleon.sharing(chameleon.tiny())
    with (
        under(model, "linear", 20) as cache,
        under(model, "linear", 20) as second,
        pytest.raises(LayoutError, match="does not end where an image begins"),
    ):
        guide = ImageGuidance(3.0, model, second)
        decode(model, chameleon.PROMPT[:, :-1], cache, 3, guidance=guide)


def test_more_tokens_than_the_layout_has_are_refused(llama):
    with under(llama, "linear", 16, layout=GRID) as cache:
        with pytest.raises(LayoutError, match="more than the 36"):
            decode(llama, PROMPT, cache, 37, decoder="sjd:window=6")
        with pytest.raises(ParameterError, match="window=64 is longer than the 40 tokens"):
            decode(llama, PROMPT, cache, 36, decoder="sjd:window=64")
