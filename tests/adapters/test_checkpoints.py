"""Subjects of checkpoints: real images, encoded and fed to the model under a policy."""

from __future__ import annotations

import json
import math
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from PIL import Image
from support.pictures import folder_of, pixels
from support.tiny_image_models import EMU3_HEADER, chameleon, emu3, janus
from test_scoring import weights_of
from test_vqgan import RUNS, checkpoint_of

import kvpolicy
from kvpolicy.errors import ParameterError
from kvpolicy.lab.compare.frechet import frechet_distance
from kvpolicy.lab.draw.image_model import Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import SUBJECTS, Setting, Subject, load_subject
from kvpolicy.lab.score.score import Networks, score
from kvpolicy_adapters.evaluation.checkpoints import llamagen, prompted_subject
from kvpolicy_adapters.evaluation.drawing.chameleon import ChameleonImages
from kvpolicy_adapters.evaluation.drawing.emu3 import Emu3Images
from kvpolicy_adapters.evaluation.drawing.forced import TeacherForced
from kvpolicy_adapters.evaluation.drawing.janus import JanusImages
from kvpolicy_adapters.evaluation.real_images import read_real_images
from kvpolicy_adapters.evaluation.scoring.inception import read_inception
from kvpolicy_adapters.images.llamagen import LlamaGen, LlamaGenConfig
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan

ROOT = Path(__file__).parents[2]
PROMPTS = ("a fox", "a red fox in the snow", "a red hat", "a hat")
FULL = Setting(kvpolicy.create("full"), None)


def half(policy="linear"):
    return Setting(kvpolicy.create(policy), "1/2")


def words(text, **options):
    return SimpleNamespace(input_ids=[5 + sum(map(ord, word)) % 7 for word in text.split()])


words.bos_token_id = 0


class JanusProcessor:
    def apply_chat_template(self, messages, add_generation_prompt):
        return messages[0]["content"][0]["text"]

    def __call__(self, text, generation_mode, return_tensors):
        return {"input_ids": torch.tensor([[1, *words(text).input_ids, 3]])}


def emu3_processor(text, return_for_image_generation, return_tensors):
    return {"input_ids": torch.tensor([[1, *(15 for _ in text[0].split()), *EMU3_HEADER]])}


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A folder of pictures with a text beside each."""
    folder = tmp_path_factory.mktemp("prompted")
    for number, prompt in enumerate(PROMPTS):
        image = np.random.default_rng(number).integers(0, 256, (30, 20, 3), np.uint8)
        Image.fromarray(image).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(prompt)
    return folder


@pytest.fixture(scope="module")
def classed(tmp_path_factory):
    """A folder a class, 3 pictures in each."""
    folder = tmp_path_factory.mktemp("classed")
    for label in range(2):
        (folder / f"n{label}").mkdir()
        for number, image in enumerate(pixels(label, 3)):
            Image.fromarray(image).save(folder / f"n{label}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LlamaGen and its VQGAN as their authors write them, tiny."""
    folder = tmp_path_factory.mktemp("llamagen")
    torch.manual_seed(0)
    config = LlamaGenConfig(
        grid_size=8,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_classes=10,
    )
    state = LlamaGen(config).state_dict()
    state["output.weight"] = torch.randn_like(state["output.weight"])
    torch.save({"model": state}, folder / "c2i.pt")
    torch.save(checkpoint_of(RUNS[0]), folder / "vq.pt")
    return folder


def of_llamagen(files, folder, **changes):
    options = {"checkpoint": files / "c2i.pt", "vq": files / "vq.pt", "images": folder}
    options |= {"grid": 8, "heads": 4, "scored": 3, "batch": 2} | changes
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items()
    }


def subject_of(family, folder, **options):
    real = read_real_images(folder, None)
    options = {"scored": 4, "batch": 2} | options
    vqgan = read_vqgan(checkpoint_of(RUNS[0]))
    model = {
        "janus": lambda: JanusImages(janus(), JanusProcessor()),
        "lumina": lambda: ChameleonImages(chameleon(sizes=True), words, vqgan, pixels=160),
        "anole": lambda: ChameleonImages(chameleon(sizes=False), words, vqgan),
        "emu3": lambda: Emu3Images(emu3(), emu3_processor),
    }[family]()
    return prompted_subject(model, real, **options)


@pytest.mark.parametrize("family", ["llamagen", "janus", "lumina", "anole", "emu3"])
def test_every_family_is_scored(family, files, classed, prompted):
    if family == "llamagen":
        subject = llamagen(**of_llamagen(files, classed, scored=4))
    else:
        subject = subject_of(family, prompted)
    assert isinstance(subject, Subject)
    full = subject.measure(FULL, 0, ["bits_per_code"])
    less = subject.measure(half(), 0, ["bits_per_code"])
    assert full.arrays["bits"].shape == (4,)
    assert (full.arrays["bits"] > 0).all()
    assert len(set(full.arrays["bits"])) == 4
    assert max(full.stats.evictions) == 0
    assert min(less.stats.evictions) > 0
    assert (less.arrays["bits"] != full.arrays["bits"]).all()
    # Budgets are of the layout that an ablation is planned with.
    budget = kvpolicy.Budget.parse("1/2").tokens(subject.layout)
    assert set(less.stats.budgets) == {budget}
    alone = (
        subject_of(family, prompted, batch=1)
        if family != "llamagen"
        else llamagen(**of_llamagen(files, classed, scored=4, batch=1))
    )
    torch.testing.assert_close(
        torch.from_numpy(alone.measure(half(), 0, ["bits_per_code"]).arrays["bits"]),
        torch.from_numpy(less.arrays["bits"]),
        atol=2e-4,
        rtol=0,
    )


def test_bits_are_those_of_one_plain_pass(files, classed):
    """Without eviction: the cross-entropy of the model's own logits, without any of this."""
    subject = llamagen(**of_llamagen(files, classed))
    model = subject.model._model
    tokens = subject._tokens(0, 3)
    classes = torch.tensor([item.row for item in subject.real.items[:3]])
    assert classes.tolist() == [0, 1, 0]
    with torch.no_grad():
        logits = model(tokens[:, :-1], condition=classes).logits
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(
        1
    )
    found = subject.measure(FULL, 0, []).arrays["bits"]
    torch.testing.assert_close(
        torch.from_numpy(found), nats.double() / math.log(2), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("family", ["janus", "lumina", "anole", "emu3"])
def test_what_is_encoded_is_what_is_drawn(family, prompted):
    """Forcing an image's tokens gives the probabilities that drawing it one by one has."""
    subject = subject_of(family, prompted, scored=2)
    items = subject.real.items[:2]
    plain = Sampler(cfg=1.0, temperature=1.0, top_k=0, top_p=1.0)
    drawn, _ = subject.model.tokens(items, half(), plain, 5)
    forced = TeacherForced(tokens=drawn)
    subject.model.tokens(items, Setting(kvpolicy.create("linear"), "1/2", forced), plain, 5)
    codes = subject.layout.rows * subject.layout.cols
    assert (forced.nats > 0).sum(1).tolist() == [codes, codes]  # the grammar's tokens are free
    assert subject._tokens(0, 2).shape == drawn.shape
    ends = forced.nats[0] == 0
    assert torch.equal(subject._tokens(0, 2)[0, ends], drawn[0, ends])
    if family != "janus":  # which draws codes only
        wrong = drawn.clone()
        wrong[:, 3] = 2
        with pytest.raises(ParameterError, match="never draws there"):
            forced = TeacherForced(tokens=wrong)
            subject.model.tokens(items, Setting(kvpolicy.create("full"), None, forced), plain, 5)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "tiny.pth"
    torch.save(weights_of(2, 1), path)
    return path


def test_what_is_drawn_is_judged_as_the_command_judges_it(files, classed, inception, tmp_path):
    options = of_llamagen(files, classed, drawn=12, inception=inception, size=8, batch=5)
    subject = llamagen(**options)
    assert subject.draws
    names = [metric.name for metric in subject.metrics]
    assert names[2:] == ["fid", "inception_score", "precision", "recall", "images_per_second"]
    found = subject.measure(half(), 1, ["fid"])
    assert "bits" not in found.arrays
    assert min(found.stats.evictions) > 0

    wanted = [subject.real.items[number % 6] for number in range(12)]
    items = [Item("x", item.row, 12 + number) for number, item in enumerate(wanted)]
    assert [item.row for item in items] == [0, 1] * 6
    drawn = subject.model.draw(items, half(), Sampler(), 1).images
    assert drawn.shape == (12, 8, 8, 3)
    real = subject.real.pixels(0, 6, 8, 8).numpy()
    networks = Networks(read_inception(inception))
    folder = folder_of(tmp_path / "drawn", drawn)
    judged = score([folder], networks, lambda *_: None).folders[str(folder)]
    assert found.figures["inception_score"] == pytest.approx(judged.inception_score.value, rel=1e-5)
    array = tmp_path / "real.npz"
    np.savez(array, real)
    again = llamagen(**options | {"reference": str(array)}).measure(half(), 1, ["fid"])
    assert again.figures["fid"] == pytest.approx(found.figures["fid"], rel=1e-6)
    seen = networks.features.look(torch.from_numpy(drawn))[0].double().numpy()
    theirs = networks.features.look(torch.from_numpy(real))[0].double().numpy()
    direct = frechet_distance(seen.mean(0), np.cov(seen.T), theirs.mean(0), np.cov(theirs.T))
    assert found.figures["fid"] == pytest.approx(direct, rel=1e-4)
    assert found.arrays["precise"].shape == (12,)
    assert found.arrays["recalled"].shape == (6,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inception": "x.pth"}, r"inception='x\.pth' judges drawn images; give drawn="),
        ({"drawn": 12}, "drawn=12: give inception=FILE"),
        ({"drawn": 9, "inception": "tiny"}, "drawn=9 must be a whole number, at least 10"),
        ({"drawn": 12, "inception": "tiny", "reference": "npz"}, "statistics of 3 features, but"),
        ({"drawn": 12, "inception": "vq.pt"}, r"vq\.pt does not hold the Inception"),
    ],
)
def test_what_judges_nothing_is_refused(files, classed, inception, tmp_path, changes, said):
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(3))
    paths = {"tiny": inception, "npz": tmp_path / "real.npz", "vq.pt": files / "vq.pt"}
    changes = {name: paths.get(value, value) for name, value in changes.items()}
    with pytest.raises(ParameterError, match=said):
        llamagen(**of_llamagen(files, classed, **changes))


def test_seeds_have_images_of_their_own(files, classed):
    subject = llamagen(**of_llamagen(files, classed))
    seen = [subject.measure(FULL, seed, []).arrays for seed in range(3)]
    assert [arrays["real"].tolist() for arrays in seen] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert np.array_equal(seen[0]["bits"], seen[2]["bits"])
    assert (seen[0]["bits"] != seen[1]["bits"]).all()


def test_an_index_names_classes_and_prompts(tmp_path):
    for number, image in enumerate(pixels(0, 2)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    lines = [
        {"path": "1.png", "class": 7, "prompt": "a"},
        {"path": "0.png", "class": 1, "prompt": "b"},
    ]
    (tmp_path / "index.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [item.row for item in read_real_images(tmp_path, 10).items] == [7, 1]
    real = read_real_images(tmp_path, None)
    assert [item.prompt for item in real.items] == ["a", "b"]
    assert torch.equal(real.pixels(0, 1, 4, 4)[0], torch.from_numpy(pixels(0, 2)[1]))
    with pytest.raises(ParameterError, match=r"1\.png is of class 7; the model has 0 to 6"):
        read_real_images(tmp_path, 7)


def test_the_middle_of_an_image_is_seen(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert (read_real_images(tmp_path, None).pixels(0, 1, 4, 4) == 200).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": "nowhere"}, "option images='nowhere' is no folder"),
        ({"scored": 7}, r"scored=7, but .* holds 6 images"),
        ({"scored": 1}, "scored=1 must be a whole number, at least 2"),
        ({"batch": 0}, "batch=0"),
        ({"grid": None}, r"c2i\.pt: its name does not say"),
        ({"device": "cuda:99"}, "use --device cpu"),
        ({"dtype": "float23"}, "float23"),
        ({"vq": "checkpoint"}, r"c2i\.pt holds no VQGAN"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(files, classed, changes, said):
    changes = {
        name: files / "c2i.pt" if value == "checkpoint" else value
        for name, value in changes.items()
    }
    with pytest.raises(ParameterError, match=said):
        llamagen(**of_llamagen(files, classed, **changes))


def test_images_without_a_prompt_or_a_whole_file_are_refused(tmp_path, files):
    Image.fromarray(pixels(0, 1)[0]).save(tmp_path / "a.png")
    with pytest.raises(ParameterError, match=r"a\.png has no prompt; write it into a\.txt"):
        read_real_images(tmp_path, None)
    with pytest.raises(ParameterError, match="holds no pictures"):
        read_real_images(tmp_path, 10)
    (tmp_path / "n0").mkdir()
    for name in "bc":
        (tmp_path / "n0" / f"{name}.png").write_bytes(b"no picture")
    subject = llamagen(**of_llamagen(files, tmp_path, scored=2))
    with pytest.raises(ParameterError, match=r"b\.png can't be read as a picture"):
        subject.measure(FULL, 0, [])


def test_a_tune_and_an_ablation_find_them_by_name(files, classed, tmp_path):
    """As an installation would have it, whose entry points are those of pyproject.toml."""
    from kvpolicy.lab.search.calibrate import calibrate

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"][SUBJECTS.group]
    assert {"chameleon", "emu3", "janus", "llamagen"} <= set(points)
    for name, value in points.items():
        module, _, made = value.partition(":")
        if name not in SUBJECTS.names():
            SUBJECTS.add(name, getattr(import_module(module), made))
    subject = load_subject("llamagen", of_llamagen(files, classed))
    with pytest.raises(ParameterError, match="no option 'image'; did you mean 'images'"):
        load_subject("llamagen", {**of_llamagen(files, classed), "image": "x"})
    with pytest.raises(ParameterError, match=r"'llamagen' needs the options vq=\.\.\. images="):
        load_subject("llamagen", {"checkpoint": "x"})
    found = calibrate(
        subject,
        kvpolicy.create("streaming_llm"),
        "1/2",
        tmp_path / "budgets.json",
        named=("llamagen", "streaming_llm"),
        moves=0,
    )
    assert sum(found.layers) == 2 * found.budget
