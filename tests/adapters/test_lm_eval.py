"""lm-evaluation-harness over a policy: scores as generation gives them, and what was evicted."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra 'lm-eval' brings the harness")

from lm_eval.api.instance import Instance
from support import tiny_models

import kvpolicy
from kvpolicy_adapters import attach
from kvpolicy_adapters.evaluation.lm_eval.model import PolicyLM

SINKS, BUDGET = 2, 12
WORDS = [f"w{number}" for number in range(tiny_models.VOCAB - 2)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1} | {word: 2 + n for n, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w0"
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


def harness(model, tokenizer, policy="streaming_llm", budget=BUDGET, **options):
    return PolicyLM(
        policy,
        budget,
        SINKS,
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        device="cpu",
        **{"batch_size": 1, "max_length": 128} | options,
    )


def text(count, first=0):
    return " ".join(WORDS[(first + 7 * n) % len(WORDS)] for n in range(count))


def asked(kind, *arguments):
    return [Instance(kind, {}, argument, 0) for argument in arguments]


PAIRS = [(text(30), " " + text(5, 3)), (text(17, 5), " " + text(2, 4)), (text(4), " w9")]


def test_a_continuation_is_scored_as_it_would_be_generated(model, tokenizer):
    lm = harness(model, tokenizer)
    found = lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(PAIRS, found, strict=True):
        prompt, target = (tokenizer(part).input_ids for part in (context, continuation))
        layout = kvpolicy.TextLayout(sinks=SINKS)
        with (
            attach(model, policy="streaming_llm", budget=BUDGET, layout=layout) as cache,
            torch.no_grad(),
        ):
            wanted = 0.0
            logits = model(torch.tensor([prompt]), **cache.as_argument).logits[0, -1]
            for token in target:
                wanted += float(logits.log_softmax(-1)[token])
                logits = model(torch.tensor([[token]]), **cache.as_argument).logits[0, -1]
        assert score == pytest.approx(wanted, abs=1e-4)
    info = lm.get_model_info()["kvpolicy"]
    assert info["peak_tokens"] == SINKS + BUDGET
    assert (info["calls"], info["calls_that_evicted"]) == (3, 2)
    assert info["nothing_was_evicted"] is False
    # 30 + 4 and 17 + 1 tokens are fed; a head keeps 14 of each.
    assert info["evicted_tokens"] == 20 + 4
    assert info["tokens_seen"] == 34 + 18 + 4


@pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "tova"])
def test_a_batch_scores_what_its_rows_do_alone(model, tokenizer, policy):
    alone = harness(model, tokenizer, policy)
    batch = harness(model, tokenizer, policy, batch_size=3)
    ones = alone.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    together = batch.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    assert [score for score, _ in together] == pytest.approx([score for score, _ in ones], abs=1e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in ones]


def test_the_full_cache_is_the_harness_itself_and_says_so(model, tokenizer, caplog):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(model, tokenizer=tokenizer, backend="causal", device="cpu", max_length=128)
    lm = harness(model, tokenizer, "h2o", 64, batch_size=2)
    rolling = asked("loglikelihood_rolling", (text(20),))
    for kind, requests in (
        ("loglikelihood", asked("loglikelihood", *PAIRS)),
        ("loglikelihood_rolling", rolling),
    ):
        ours = getattr(lm, kind)(requests, disable_tqdm=True)
        wanted = getattr(theirs, kind)(requests, disable_tqdm=True)
        flat = [score[0] if isinstance(score, tuple) else score for score in ours]
        assert flat == pytest.approx(
            [score[0] if isinstance(score, tuple) else score for score in wanted], abs=1e-4
        )
    with caplog.at_level(logging.WARNING):
        assert lm.get_model_info()["kvpolicy"]["nothing_was_evicted"] is True
    assert "nothing was evicted in" in caplog.text
    tight = harness(model, tokenizer, "h2o", BUDGET)
    scores = tight.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert scores[0] != pytest.approx(wanted[0], abs=1e-3)


def test_generation_and_chats_longer_than_the_budget(model, tokenizer):
    lm = harness(model, tokenizer, batch_size=2)
    chat = lm.apply_chat_template([{"role": "user", "content": text(40)}])
    options = {"until": ["w55"], "max_gen_toks": 8}
    prompts = [chat, text(25, 9)]
    found = lm.generate_until(
        asked("generate_until", *((prompt, options) for prompt in prompts)), disable_tqdm=True
    )
    for prompt, said in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        layout = kvpolicy.TextLayout(sinks=SINKS)
        with attach(model, policy="streaming_llm", budget=BUDGET, layout=layout) as cache:
            tokens = model.generate(
                ids, **cache.as_argument, max_new_tokens=8, do_sample=False, eos_token_id=1
            )
        wanted = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert said.strip() == wanted.split("w55")[0].strip()
    info = lm.get_model_info()["kvpolicy"]
    assert info["evicted_tokens"] > 20
    assert info["calls_that_evicted"] == 1


def test_wrong_arguments_are_refused_before_a_model_is_loaded(tokenizer):
    for arguments, kind, said in (
        ((), kvpolicy.ParameterError, "budget is missing"),
        (("h3o", 12), kvpolicy.UnknownNameError, "h2o"),
        (("h2o", "1/6"), kvpolicy.BudgetError, "1/6"),
    ):
        with pytest.raises(kind, match=said):
            PolicyLM(*arguments, pretrained="nowhere/at-all", tokenizer=tokenizer)
