"""clipart-ar: words in, pictures in colour out, on both of its grids; with random weights."""

from __future__ import annotations

import math
import runpy
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from support.tiny_clipart import CODES, WORDS, write_clipart
from torch.nn import functional

import kvpolicy
from kvpolicy.errors import ParameterError, ShapeError
from kvpolicy.lab.draw.image_model import ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting, load_subject
from kvpolicy_adapters import zoo
from kvpolicy_adapters.evaluation import clipart
from kvpolicy_adapters.evaluation.drawing.clipart import ClipartImages
from kvpolicy_adapters.zoo.clipart import CLIPART_FILES, open_clipart
from kvpolicy_adapters.zoo.clipart_tokens import ClipartTokens
from kvpolicy_adapters.zoo.sealed import CorruptFileError

SHIPPED = files("kvpolicy_adapters.zoo").joinpath("clipart_ar")
SUBJECT = "kvpolicy_adapters.evaluation.clipart:ClipartAR"
BOTH = pytest.mark.parametrize("breaks", [False, True], ids=["plain", "line breaks"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clipart")
    write_clipart(path)
    return path


@pytest.fixture(scope="module")
def box(folder):
    return open_clipart(str(folder))


def setting(policy="full", budget=None, decoder="sequential"):
    return Setting(kvpolicy.create(policy), budget, kvpolicy.Decoder.parse(decoder))


# --- words ----------------------------------------------------------------------------------------


def test_a_prompt_is_a_set_of_words():
    tokens = ClipartTokens(WORDS, CODES)
    assert (
        tokens.words("France, flags") == tokens.words("flags FRANCE flags") == ("flags", "france")
    )
    one = tokens.prefix(("flags", "france"), line_breaks=False)
    assert one == tokens.prefix(("france", "flags"), line_breaks=False)
    assert one[:6] == [tokens.blank] * 6
    assert len(one) == len(tokens.prefix((), line_breaks=True)) == 9
    ids = {*range(CODES), tokens.line_break, tokens.start(False), tokens.start(True), tokens.blank}
    ids |= {tokens.prefix((word,), line_breaks=False)[-2] for word in WORDS}
    assert ids == set(range(tokens.size))  # nothing means two things, and nothing means none


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "has no words"),
        (" ?! ", "has no words"),
        ("a flags", "does not know 'a'"),
        ("aple", "does not know 'aple'; did you mean 'apple'"),
        (" ".join(WORDS[:9]), "has 9 words; clipart-ar takes 8 at most"),
    ],
)
def test_prompts_that_it_can_not_read_are_refused(folder, prompt, said):
    model = ClipartImages(ModelSource("clipart-ar", str(folder)))
    with pytest.raises(ParameterError, match=rf"prompt 7: .*{said}"):
        model.check(Item("x.png", 7, 0, prompt), Sampler())
    model.check(Item("x.png", 7, 0, "apple"), Sampler())
    with pytest.raises(ParameterError, match="draws prompts, not classes"):
        model.check(Item("x.png", 3, 0), Sampler())


# --- grids ----------------------------------------------------------------------------------------


@BOTH
def test_both_grids_hold_the_same_codes(box, breaks):
    layout = box.layout(line_breaks=breaks)
    tokens = box.test_tokens(5, line_breaks=breaks)
    assert tokens.shape == (5, layout.length)
    codes = box.tokens.codes_of(tokens[:, layout.prefix :], line_breaks=breaks)
    assert torch.equal(codes, box._codes["test"].long())
    ends = [p for p in range(layout.prefix, layout.length) if layout.column(p) == 24]
    assert len(ends) == 24 * breaks
    assert (tokens[:, ends] == box.tokens.line_break).all()
    assert (tokens[0, :9] == box.prompts(["flags france"], line_breaks=breaks)[0]).all()
    assert (tokens[1, :9] == box.unconditional(line_breaks=breaks)[0]).all()
    with pytest.raises(ShapeError, match=r"a picture is tokens \[n, "):
        box.images(tokens, line_breaks=breaks)
    assert box.images(tokens[:2, 9:], line_breaks=breaks).shape == (2, 96, 96, 3)


@BOTH
def test_the_grammar_lets_come_what_comes_in_real_drawings(box, breaks):
    layout, rule = box.layout(line_breaks=breaks), box.grammar(line_breaks=breaks)
    tokens = box.test_tokens(1, line_breaks=breaks)
    scores = torch.randn(1, box.tokens.size)
    for position in range(layout.prefix, layout.length):
        left = rule(tokens[:, :position], scores)[0]
        assert left[tokens[0, position]] > -math.inf
        assert int((left > -math.inf).sum()) == (1 if layout.column(position) == 24 else CODES)
    first = rule(tokens[:, :9], scores)[0]
    assert torch.equal(first[:CODES], scores[0, :CODES])


# --- the subject ----------------------------------------------------------------------------------


@BOTH
def test_bits_are_those_of_the_codes_alone(box, folder, breaks):
    subject = load_subject(SUBJECT, {"folder": str(folder), "scored": 5, "line_breaks": breaks})
    tokens = box.test_tokens(5, line_breaks=breaks)
    with torch.no_grad():
        logits = box.model(tokens[:, :-1]).logits[:, 8:]
    nats = functional.cross_entropy(logits.mT, tokens[:, 9:], reduction="none")
    codes = box.tokens.codes_of(tokens[:, 9:], line_breaks=breaks)
    expected = nats[tokens[:, 9:] != box.tokens.line_break].view(5, -1).mean(1) / math.log(2)
    assert codes[0].numel() == 576
    found = subject.measure(setting(), 0, ["bits_per_code"])
    np.testing.assert_allclose(found.arrays["bits"], expected.double(), atol=1e-4)
    less = subject.measure(setting("streaming_llm", "1/6"), 0, ["bits_per_code"])
    assert np.abs(less.arrays["bits"] - found.arrays["bits"]).min() > 1e-4
    assert (
        less.stats.peak_tokens == ((9 + subject.layout.rows * subject.layout.line_length // 6),) * 2
    )


@BOTH
def test_bits_under_guidance_are_of_what_drawing_draws_from(box, folder, breaks):
    options = {"folder": str(folder), "scored": 3, "line_breaks": breaks, "cfg": 2.5}
    subject = load_subject(SUBJECT, options)
    tokens, rule = box.test_tokens(3, line_breaks=breaks), box.grammar(line_breaks=breaks)
    nothing = box.unconditional(line_breaks=breaks).expand(3, -1)
    with torch.no_grad():
        said = box.model(tokens[:, :-1]).logits
        unsaid = box.model(torch.cat([nothing, tokens[:, 9:-1]], dim=1)).logits
    bits = torch.zeros(3, dtype=torch.float64)
    for place in range(9, tokens.shape[1]):  # token by token, as a decoder does
        one, other = said[:, place - 1], unsaid[:, place - 1]
        chances = rule(tokens[:, :place], other + 2.5 * (one - other)).double().log_softmax(-1)
        bits -= chances.gather(1, tokens[:, place : place + 1])[:, 0] / math.log(2)
    found = subject.measure(setting(), 0, ["guided_bits_per_code"])
    np.testing.assert_allclose(found.arrays["guided_bits"], bits / 576, atol=1e-4)
    assert set(found.arrays) == {"guided_bits", "real"}


@pytest.mark.slow
def test_what_a_full_cache_draws_does_not_diverge_and_what_noise_keeps_does(folder):
    options = {"folder": str(folder), "scored": 2, "images": 2, "batch": 2, "cfg": 1.5}
    subject = load_subject(SUBJECT, options)
    full = subject.measure(setting(), 0, ["divergence"])
    assert (full.arrays["divergence"] == 0).all()
    assert list(full.arrays["classes"]) == [0, 1]
    assert subject.class_names[:2] == ("flags france", "(no words)")
    some = subject.measure(setting("random", "1/24"), 0, ["divergence"])
    assert some.arrays["divergence"].mean() > 0.01
    other = load_subject(SUBJECT, {**options, "draw_seed": 1})
    assert not np.array_equal(other.measure(setting(), 0, ["passes"]).images, full.images)


def test_seeds_see_drawings_of_their_own_and_calibration_sees_others(folder):
    subject = load_subject(SUBJECT, {"folder": str(folder), "scored": 2})
    real = [subject.measure(setting(), seed, ["bits_per_code"]).arrays["real"] for seed in range(3)]
    assert [list(some) for some in real] == [[0, 1], [2, 3], [0, 1]]
    other = subject.calibration()
    assert other.split == "calibration"
    assert not torch.equal(other._real(0, 2), subject._real(0, 2))


def test_where_heads_look_is_seen_of_drawings_in_batches(folder, monkeypatch):
    subject = load_subject(SUBJECT, {"folder": str(folder), "scored": 3})
    found = {}
    for batch in (1, 8):
        monkeypatch.setattr(clipart, "_WATCHED_BATCH", batch)
        found[batch] = subject.watched(setting(), 0, 3, kvpolicy.watch_offsets).finish("clipart")
    pixels = subject.layout.rows * subject.layout.line_length
    assert found[1].queries == found[8].queries == 3 * pixels
    heads = ([head for layer in each.layers for head in layer] for each in found.values())
    for one, other in zip(*heads, strict=True):
        assert one.far == pytest.approx(other.far, rel=1e-4)
        assert one.near[4] == pytest.approx(other.near[4], rel=1e-4)
    with pytest.raises(kvpolicy.ParameterError, match="images=9 must be a whole number from 1 to"):
        subject.watched(setting(), 0, 9, kvpolicy.watch_offsets)


def test_a_trace_keeps_pictures_in_colour_and_prompts(folder, tmp_path):
    subject = load_subject(SUBJECT, {"folder": str(folder), "scored": 2})
    (tmp_path / "a.safetensors").write_bytes(subject.trace(setting("linear", "1/4"), 0))
    found = kvpolicy.load_trace(tmp_path / "a.safetensors")
    assert found.prompts == ("flags france", "")
    assert tuple(found.images.shape) == (2, 96, 96, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folder": "nowhere"}, "nowhere holds no clipart-ar: no card.json"),
        ({"split": "tset"}, "split='tset'; did you mean 'test'"),
        ({"scored": 6}, "scored=6 must be a whole number from 2 to 5"),
        ({"images": 0}, "images=0 must be a whole number from 1"),
        ({"batch": 101}, "batch=101 must be a whole number from 1 to 100"),
        ({"line_breaks": 1}, "line_breaks=1 must be true or false"),
        ({"cfg": 0.5}, "cfg=0.5 must be a number, at least 1"),
    ],
)
def test_bad_options_are_refused(folder, options, said):
    if options and "folder" not in options:
        options = {"folder": str(folder), "scored": 2, **options}
    with pytest.raises(ParameterError, match=said):
        load_subject(SUBJECT, options)


def test_a_damaged_file_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "drawings.json").write_text("{}")
    with pytest.raises(CorruptFileError, match=r"drawings\.json is damaged"):
        open_clipart(str(tmp_path))
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(CorruptFileError, match=r"card\.json can't be read"):
        open_clipart(str(tmp_path))


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "nowhere"}, "nowhere holds no clipart-ar: no card.json; leave it out"),
        ({"vq": "vq.pt"}, "has a decoder of its own"),
        ({"dtype": "float16"}, "computes in float32"),
        ({"options": (("line_breaks", 2),)}, "line_breaks=2 must be 0 or 1"),
        ({"options": (("grid", 2),)}, "no option 'grid'"),
    ],
)
def test_a_source_that_it_can_not_serve(folder, source, said):
    with pytest.raises(ParameterError, match=said):
        ClipartImages(ModelSource("clipart-ar", **{"path": str(folder), **source}))


@pytest.mark.slow
def test_a_picture_is_its_prompts_and_not_its_batchs(folder):
    model = ClipartImages(ModelSource("clipart-ar", str(folder)))
    wanted = [Item(f"{row}.png", row, 0, said) for row, said in enumerate(("apple", "flags 2"))]
    both = model.draw(wanted, setting("linear", "1/6"), Sampler(cfg=3), seed=1)
    assert both.images.shape == (2, 96, 96, 3)
    assert both.images.dtype == np.uint8
    assert len(both.stats) == 2  # guidance has a cache of its own
    assert min(min(stats.evictions) for stats in both.stats) > 0
    alone = model.draw(wanted[1:], setting("linear", "1/6"), Sampler(cfg=3), seed=1)
    assert np.abs(alone.images[0].astype(int) - both.images[1]).max() <= 1
    other = model.draw(wanted[1:], setting("linear", "1/6"), Sampler(cfg=1), seed=1)
    assert len(other.stats) == 1
    assert not np.array_equal(other.images[0], both.images[1])


@pytest.mark.slow
def test_the_subject_draws_with_any_decoder(folder):
    options = {"folder": str(folder), "scored": 2, "images": 3, "batch": 2, "line_breaks": True}
    subject = load_subject(SUBJECT, options)
    found = subject.measure(setting("linear", "1/4", "sjd:window=16"), 0, ["passes"])
    assert found.images.shape == (3, 96, 96, 3)
    assert found.arrays["passes"].shape == (3,)
    assert (found.arrays["passes"] <= 600).all()


# --- the model that ships -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return zoo.load("clipart-ar")


def test_what_ships_is_stock_llama_and_small(shipped):
    assert type(shipped.model).__name__ == "LlamaForCausalLM"
    assert {param.dtype for param in shipped.model.parameters()} == {torch.float32}
    assert not any(param.requires_grad for param in shipped.model.parameters())
    assert not shipped.model.training
    size = sum(param.numel() for param in shipped.model.parameters())
    assert size == shipped.card.parameters <= 8e6
    files = [SHIPPED.joinpath(name) for name in (*CLIPART_FILES, "card.json", "MODEL_CARD.md")]
    assert sum(len(file.read_bytes()) for file in files) <= 24 * 2**20
    assert set(shipped.card.files) == set(CLIPART_FILES)


def test_its_cards_say_what_the_weights_do(shipped):
    subject = load_subject(SUBJECT, {"scored": 20})
    bits = subject.measure(setting(), 0, ["bits_per_code"]).arrays["bits"]
    assert bits.mean() == pytest.approx(shipped.card.bits_per_code_20, abs=1e-3)
    assert shipped.card.bits_per_code < min(shipped.card.bits_of_counting.values())
    page = SHIPPED.joinpath("MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"**{shipped.card.bits_per_code:.4f} bits per code**" in page


def test_drawings_that_ship_and_no_names_of_those_who_drew(shipped):
    assert shipped.test_tokens(400).shape == (400, 585)
    assert shipped.calibration_tokens(200, line_breaks=True).shape == (200, 609)
    said = {
        word
        for split in ("test", "calibration")
        for line in shipped.said(split)
        for word in line.split()
    }
    assert said <= set(shipped.tokens.vocabulary)
    assert not {"nicu", "architetto", "juliane"} & set(shipped.tokens.vocabulary)
    with pytest.raises(ParameterError, match="n=401: between 1 and 400 test drawings"):
        shipped.test_tokens(401)
    pixels = shipped.images(shipped.test_tokens(1)[:, 9:])
    assert pixels[0, :2].min() > 220  # a drawing's edge is white


def test_the_sheets_prompts_are_words_that_it_knows(shipped):
    script = Path(__file__).parents[2] / "examples" / "clipart_sheet.py"
    prompts = runpy.run_path(str(script))["PROMPTS"]
    assert len(prompts) == 20
    assert shipped.prompts(prompts).shape == (20, 9)
