"""The model in the box: what it gives, what its card claims, and what happens to damaged files."""

import json
import math
import shutil
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch.nn import functional

import kvpolicy
from kvpolicy.lab.compare.frechet import frechet_distance
from kvpolicy_adapters import zoo
from kvpolicy_adapters.zoo.fashion import FILES, pack_pixels, read_fashion, unpack_pixels

FOLDER = files("kvpolicy_adapters.zoo").joinpath("fashion_ar")
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def box():
    return zoo.load("fashion-ar")


def test_model_is_stock_llama_ready_to_use(box):
    assert type(box.model).__name__ == "LlamaForCausalLM"
    assert not box.model.training
    assert {p.dtype for p in box.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in box.model.parameters())
    assert box.model.config.vocab_size == 27
    assert box.layout == kvpolicy.RasterLayout(rows=28, cols=28, prefix=1)


def test_folder_is_what_transformers_loads_by_itself(box):
    model = type(box.model).from_pretrained(FOLDER, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, box.model.state_dict()[name]), name


def test_test_tokens_are_whole_sequences(box):
    tokens = box.test_tokens(1000)
    assert tokens.shape == (1000, 785)
    assert tokens.dtype == torch.int64
    assert 16 <= tokens[:, 0].min() <= tokens[:, 0].max() <= 25
    assert tokens[:, 1:].min() == 0
    assert tokens[:, 1:].max() == 15
    assert torch.equal(box.test_tokens(3), tokens[:3])


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_more_test_images_than_ship_are_refused(box, n):
    with pytest.raises(ValueError, match=rf"n={n}: between 1 and 1000"):
        box.test_tokens(n)


def test_changing_what_was_handed_out_changes_nothing(box):
    box.test_tokens(1).zero_()
    assert box.test_tokens(1).any()


def test_card_says_what_the_weights_do(box):
    tokens = box.test_tokens(64)
    with torch.inference_mode():
        nats = [
            functional.cross_entropy(
                box.model(part[:, :-1]).logits.transpose(1, 2), part[:, 1:], reduction="none"
            )
            for part in tokens.split(16)
        ]
    bits = torch.cat(nats).double().mean().item() / math.log(2)
    assert bits == pytest.approx(box.card.bits_per_pixel_64, abs=1e-3)
    assert box.card.bits_per_pixel <= 0.95


def test_classifier_is_as_good_as_its_card_says(box):
    tokens = box.test_tokens(1000)
    accuracy = (box.classify(tokens[:, 1:]) == tokens[:, 0] - 16).double().mean().item()
    # Convolutions of another machine may round a borderline image to the other side.
    assert accuracy == pytest.approx(box.card.classifier_accuracy_1000, abs=2e-3)
    assert box.card.classifier_accuracy >= 0.92


def test_real_images_are_near_the_reference_and_noise_is_far(box):
    mean, covariance = box.reference
    pixels = box.test_tokens(1000)[:, 1:]
    noise = pixels[:, torch.randperm(784, generator=torch.Generator().manual_seed(0))]
    near, far = (
        frechet_distance(f.mean(0), np.cov(f, rowvar=False), mean, covariance)
        for f in (box.features(x).double().numpy() for x in (pixels, noise))
    )
    assert mean.shape == (64,)
    assert covariance.shape == (64, 64)
    assert 0 < near < far / 20


def test_features_are_independent_of_the_batch(box):
    pixels = box.test_tokens(8)[:, 1:]
    together = box.features(pixels)
    assert together.shape == (8, 64)
    assert torch.allclose(box.features(pixels[3:4]), together[3:4], atol=1e-5)


def test_images_are_for_looking_at(box):
    pixels = box.test_tokens(2)[:, 1:]
    images = box.images(pixels)
    assert images.shape == (2, 28, 28)
    assert images.dtype == np.uint8
    assert images.max() == 255
    assert np.array_equal(images.reshape(2, 784), pixels.numpy() * 17)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(2, 785, dtype=torch.long), "without the class token"),
        (torch.zeros(784, dtype=torch.long), r"\[784\]"),
        (torch.zeros(2, 784), "float32"),
        (torch.full((1, 784), 16), "16 to 16"),
    ],
)
@pytest.mark.parametrize("method", ["features", "classify", "images"])
def test_wrong_pixels_are_refused(box, method, pixels, words):
    with pytest.raises(kvpolicy.ShapeError, match=words):
        getattr(box, method)(pixels)


def test_unknown_name_lists_near_matches():
    with pytest.raises(kvpolicy.UnknownNameError, match="did you mean 'fashion-ar'"):
        zoo.load("fashion_ar")
    assert zoo.available() == ("clipart-ar", "fashion-ar", "fashion-lpd")


def test_loading_leaves_the_callers_seed_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    zoo.load("fashion-ar")
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "fashion_ar")
    return tmp_path / "fashion_ar"


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_noticed(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(zoo.CorruptFileError, match=rf"{name} is damaged: SHA-256"):
        read_fashion(copy)


def test_missing_file_is_named(copy):
    (copy / "reference.safetensors").unlink()
    with pytest.raises(zoo.CorruptFileError, match=r"reference\.safetensors can't be read"):
        read_fashion(copy)


@pytest.mark.parametrize("text", ["", "{}", '{"name": 1}'])
def test_damaged_card_is_noticed(copy, text):
    (copy / "card.json").write_text(text)
    with pytest.raises(zoo.CorruptFileError, match=r"card\.json can't be read"):
        read_fashion(copy)


def test_file_without_a_seal_is_not_read(copy):
    card = json.loads((copy / "card.json").read_text())
    del card["files"]["model.safetensors"]
    (copy / "card.json").write_text(json.dumps(card))
    with pytest.raises(zoo.CorruptFileError, match=r"no SHA-256 for model\.safetensors"):
        read_fashion(copy)


def test_pixels_survive_packing():
    pixels = torch.arange(2 * 784).remainder(16).to(torch.uint8).view(2, 784)
    assert torch.equal(unpack_pixels(pack_pixels(pixels)), pixels)


def test_everything_ships_within_its_limits():
    sizes = {file.name: len(file.read_bytes()) for file in FOLDER.iterdir()}
    assert sizes["model.safetensors"] <= 8 * MEGABYTE
    assert sizes["classifier.safetensors"] <= 1.5 * MEGABYTE
    assert sum(sizes.values()) <= 12 * MEGABYTE


def test_people_read_the_same_figures(box):
    prose = FOLDER.joinpath("MODEL_CARD.md").read_text()
    for figure in (
        f"{box.card.bits_per_pixel:.4f}",
        f"{box.card.classifier_accuracy:.2%}",
        f"{box.card.parameters:,}",
        f"{box.card.steps:,}",
    ):
        assert figure in prose, figure
    assert "Permission is hereby granted" in FOLDER.joinpath("LICENSE.fashion-mnist").read_text()
