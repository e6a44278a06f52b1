"""The scripts that train clipart-ar: batches, attention, going on, and what counting predicts."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")
typer = pytest.importorskip("typer", reason="needs the extra 'lab'")

SCRIPTS = Path(__file__).parents[2] / "examples" / "training"
WORDS = [("flags", "europe"), (), ("fruit",), ("people", "smilies", "red")]


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import clipart_ngrams
        import train_clipart_ar
    finally:
        sys.path.remove(str(SCRIPTS))
    return train_clipart_ar, clipart_ngrams


class Drawn:
    """Codes without a VQGAN: each drawing's are its number and its variant's."""

    def variant(self, number):
        codes = torch.arange(len(WORDS)).view(-1, 1, 1) * 8 + number
        return codes.expand(-1, 24, 24).to(torch.int16)


@pytest.fixture(scope="module")
def batches(scripts):
    vocabulary = ("flags", "europe", "fruit", "people", "smilies", "red")
    tokens = scripts[0].ClipartTokens(vocabulary, 32)
    return scripts[0].Batches(tokens, WORDS, Drawn(), batch=2, seed=3)


def test_a_batch_is_a_function_of_its_step_and_each_pass_sees_every_drawing(batches):
    tokens = batches.tokens
    for epoch in (0, 1, 9):
        seen = []
        for step in (2 * epoch, 2 * epoch + 1):
            batch = batches.at(step)
            assert torch.equal(batch, batches.at(step))
            breaks = bool(step % 2)
            assert batch.shape == (2, tokens.layout(breaks).length)
            codes = tokens.codes_of(batch[:, 9:], line_breaks=breaks)
            assert (codes % 8 == epoch % 8).all()  # one variant a pass, in turns
            for prompt, code in zip(batch[:, :9], codes[:, 0, 0], strict=True):
                whole = tokens.prefix(WORDS[code // 8], line_breaks=breaks)
                assert set(prompt.tolist()) <= {*whole, tokens.blank}
                seen.append(int(code) // 8)
        assert sorted(seen) == [0, 1, 2, 3]


def test_prompts_say_all_some_or_none_of_the_words(scripts):
    draws = np.random.default_rng(0)
    words = ("a", "b", "c")
    found = Counter(scripts[0].said(words, draws) for _ in range(4000))
    assert found[()] / 4000 == pytest.approx(0.1, abs=0.02)
    assert found[words] / 4000 > 0.45
    assert len(found) == 8  # every subset
    assert scripts[0].said((), draws) == ()


def test_attention_by_products_is_attention(scripts):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 300, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 300, 8, requires_grad=True)
    found, _ = scripts[0].attend(None, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    mine = torch.autograd.grad(found, (query, key, value), direction)
    theirs = torch.autograd.grad(expected, (query, key, value), direction)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def run_of(module, batches, out, steps, falling):
    recipe = module.Recipe(
        vqgan="", vocabulary=batches.tokens.size, layers=1, width=16, heads=2, kv_heads=1,
        head_dim=8, hidden=16, rope_theta=500.0, batch=2, muon_lr=0.01, adam_lr=0.01, warmup=1,
        ema=0.9, seed=0,
    )  # fmt: skip
    out.mkdir(exist_ok=True)
    return module.Run(recipe, out, steps, falling)


def test_going_on_is_not_having_stopped(scripts, batches, tmp_path):
    module = scripts[0]
    whole = run_of(module, batches, tmp_path / "a", 4, 2)
    for step in range(4):
        whole.train_step(batches.at(step))
    half = run_of(module, batches, tmp_path / "b", 4, 2)
    for step in range(2):
        half.train_step(batches.at(step))
    half.save()
    other = run_of(module, batches, tmp_path / "b", 4, 2)
    other.load(tmp_path / "b" / "checkpoint.pt", resumes=True)
    for step in range(other.step, 4):
        other.train_step(batches.at(step))
    assert other.rate() == 0
    for one, two in zip(whole.ema.parameters(), other.ema.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_rate_that_has_begun_to_fall_does_not_rise_again(scripts, batches, tmp_path):
    module = scripts[0]
    run = run_of(module, batches, tmp_path / "a", 3, 2)
    for step in range(2):
        if run.step == 1:
            run.save("plateau.pt")
        run.train_step(batches.at(step))
    run.save()
    longer = run_of(module, batches, tmp_path / "a", 6, 2)
    with pytest.raises(typer.BadParameter, match=r"rate has been falling from 1 on.*plateau\.pt"):
        longer.load(tmp_path / "a" / "checkpoint.pt", resumes=True)
    longer.load(tmp_path / "a" / "plateau.pt", resumes=False)
    assert (longer.step, longer.rate()) == (1, 1.0)
    shorter = run_of(module, batches, tmp_path / "a", 2, 2)
    with pytest.raises(typer.BadParameter, match="give more --steps"):
        shorter.load(tmp_path / "a" / "plateau.pt", resumes=False)


def test_what_counting_predicts_is_what_counting_by_hand_does(scripts):
    draws = torch.Generator().manual_seed(0)
    train, tuned, test = (torch.randint(0, 3, (n, 4, 5), generator=draws) for n in (6, 2, 2))
    found = scripts[1].ngram_bits(train, tuned, test, 3)

    def by_hand(prior):
        seen = Counter(train.flatten().tolist())
        share = {c: (seen[c] + prior / 3) / (train.numel() + prior) for c in range(3)}
        return {
            name: -sum(math.log2(share[c]) for c in part.flatten().tolist()) / part.numel()
            for name, part in (("tuned", tuned), ("test", test))
        }

    best = min((by_hand(prior) for prior in scripts[1].PRIORS), key=lambda bits: bits["tuned"])
    assert found["unigram"] == pytest.approx(best["test"], abs=1e-4)
    # A picture whose rows are all alike is known from the code above, and not from the left.
    rows = torch.randint(0, 50, (8, 1, 24), generator=draws).expand(-1, 24, -1)
    found = scripts[1].ngram_bits(rows[:6], rows[6:7], rows[7:], 50)
    assert found["above"] < 1 < found["left"]
    assert found["left and above"] < found["left"] / 2
