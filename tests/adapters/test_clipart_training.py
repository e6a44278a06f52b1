"""The scripts of clipart-ar: batches, attention, going on, what counting predicts, and packing."""

from __future__ import annotations

import hashlib
import json
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
        import pack_clipart_ar
        import train_clipart_ar
    finally:
        sys.path.remove(str(SCRIPTS))
    return train_clipart_ar, clipart_ngrams, pack_clipart_ar


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


def test_what_is_packed_is_what_the_zoo_reads_and_says_what_it_does(scripts, tmp_path):
    import kvpolicy
    from kvpolicy.lab.run.subject import Setting
    from kvpolicy_adapters.evaluation.clipart import ClipartAR
    from kvpolicy_adapters.images.vqgan import VQGAN, VQGANConfig
    from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan, save_vqgan

    module, _, packing = scripts
    clipart, vqgan, run = (tmp_path / name for name in ("clipart", "vqgan", "run"))
    for folder in (clipart, vqgan, run):
        folder.mkdir()
    draws = np.random.default_rng(0)
    np.savez(clipart / "images.npz", images=draws.integers(0, 256, (8, 96, 96, 3), np.uint8))
    said = [["flags", "nicu"], ["flags"], [], ["fruit", "red"], ["nicu"], ["red"], ["fruit"], []]
    about = {
        "vocabulary": ["flags", "nicu", "fruit", "red"],
        "held_out": [0, 3, 4],
        "calibration": [1, 2],
        "drawings": [[f"{place}.png", "", words] for place, words in enumerate(said)],
    }
    (clipart / "drawings.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    shape = VQGANConfig(32, (1, 1, 1), 1, 32, 24, 2, (), groups=8)
    save_vqgan(VQGAN(shape), vqgan / "vqgan.safetensors")
    coder = read_vqgan(vqgan / "vqgan.safetensors").float()
    (vqgan / "log.jsonl").write_text('{"step": 7}\n')
    digest = hashlib.sha256((vqgan / "vqgan.safetensors").read_bytes()).hexdigest()
    recipe = module.Recipe(
        vqgan=digest, vocabulary=24 + 4 + 4, layers=1, width=16, heads=2, kv_heads=1, head_dim=8,
        hidden=16, rope_theta=500.0, batch=2, muon_lr=0.01, adam_lr=0.01, warmup=1, ema=0.9, seed=0,
    )  # fmt: skip
    trained = module.Run(recipe, run, 5, 2)
    trained.export(run / "export")
    trained.step, trained.seconds = 5, 120.0
    trained.log(event="start", recipe=vars(recipe), falling=2)
    codes = torch.randint(0, 24, (3, 24, 24)).to(torch.int16)
    np.save(run / f"codes-{digest[:8]}-0.npy", codes.numpy())
    out = tmp_path / "out"
    packing.main(clipart, vqgan, run, out)

    subject = ClipartAR(str(out), scored=3)
    box = subject.zoo
    assert (box.card.steps, box.card.training_minutes, box.card.vqgan_steps) == (5, 2.0, 7)
    assert box.said("test") == ["flags", "fruit red", ""]  # not the names of those who drew
    assert box.said("calibration") == ["flags", ""]
    with pytest.raises(ValueError, match="does not know 'nicu'"):
        box.prompts(["nicu flags"])
    # The others are the tokens that they were in training.
    whole = module.ClipartTokens(about["vocabulary"], 24)
    assert box.prompts(["red fruit"])[0].tolist() == whole.prefix(("fruit", "red"), line_breaks=0)
    assert box.tokens.size == whole.size
    real = module.encode(coder, np.load(clipart / "images.npz")["images"][[0, 3, 4]])
    assert torch.equal(box.test_tokens(3)[:, 9:].view(3, 24, 24), real.long())
    full = Setting(kvpolicy.create("full"), None)
    bits = subject.measure(full, 0, ["bits_per_code"]).arrays["bits"].mean()
    assert bits == pytest.approx(box.card.bits_per_code, abs=1e-3)
    assert box.card.bits_per_code_20 == box.card.bits_per_code  # there are three
    page = (out / "MODEL_CARD.md").read_text()
    assert f"**{box.card.bits_per_code:.4f} bits per code**" in page
    assert "--steps 5 --falling 2" in page
    (vqgan / "vqgan.safetensors").write_bytes(b"another")
    with pytest.raises(typer.BadParameter, match="trained on codes of another VQGAN"):
        packing.main(clipart, vqgan, run, out)
