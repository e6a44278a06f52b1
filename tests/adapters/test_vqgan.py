"""VQGANs: the authors' pixels and codes, their files, and files that are something else.

The numbers in ``vqgan.json`` are what the authors' code gave for weights drawn from a seed, which
are drawn again here; nothing of that code is part of kvpolicy.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from kvpolicy import ParameterError, ShapeError
from kvpolicy_adapters.images.memory import in_pieces
from kvpolicy_adapters.images.vqgan import VQGAN, VQGANConfig, from_pixels, to_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan, save_vqgan

RUNS = json.loads(Path(__file__).with_name("vqgan.json").read_text(encoding="utf-8"))


def weights_of(run):
    """The weights that the run was made with, under their authors' names."""
    chance, weights = np.random.default_rng(run["seed"]), {}
    for name in sorted(run["shapes"]):
        shape = run["shapes"][name]
        drawn = chance.standard_normal(shape).astype(np.float32)
        if len(shape) == 4:
            drawn *= 1.2 / np.sqrt(np.prod(shape[1:]))
        elif re.search(r"norm\w*\.weight", name):
            drawn = 1 + 0.2 * drawn
        elif len(shape) == 1:
            drawn *= 0.1
        weights[name] = torch.from_numpy(drawn)
    return weights


def checkpoint_of(run):
    """As the authors' training writes it: what is not the model lies beside it."""
    beside = {
        "quantize.codebook_used": torch.zeros(8),
        "loss.discriminator.main.0.weight": torch.zeros(3),
    }
    return {run["nested"]: weights_of(run) | beside, "steps": 3, "args": argparse.Namespace(lr=1)}


@pytest.fixture(scope="module")
def tiny():
    return read_vqgan(checkpoint_of(RUNS[0]))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_codes_and_pixels_are_the_authors(run, tmp_path):
    torch.save(checkpoint_of(run), tmp_path / "vq.pt")
    model = read_vqgan(tmp_path / "vq.pt")
    chance = np.random.default_rng(100 + run["seed"])
    images = torch.from_numpy(chance.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32))
    found = model.encode(images)
    assert found.tolist() == run["codes"]
    assert len(found.unique()) > 5  # the images are not all one code
    codes = torch.from_numpy(chance.integers(0, 64, found.shape))
    pixels = model.decode(codes)
    theirs = torch.tensor(run["pixels"])
    assert theirs.std() > 0.1
    torch.testing.assert_close(pixels[:, :, ::5, ::5].flatten(), theirs, atol=1e-4, rtol=0)

    save_vqgan(model, tmp_path / "vq.safetensors")
    again = read_vqgan(tmp_path / "vq.safetensors")
    assert again.config == model.config
    assert torch.equal(again.decode(codes), pixels)
    assert torch.equal(again.encode(images), found)


def test_groups_that_no_released_one_has_are_kept_in_the_file(tmp_path):
    config = VQGANConfig(
        channels=32, multipliers=(1, 1), blocks=1, latent=32, codes=9, attends=(), groups=4
    )
    torch.manual_seed(0)
    model = VQGAN(config).eval()
    save_vqgan(model, tmp_path / "vq.safetensors")
    again = read_vqgan(tmp_path / "vq.safetensors")
    codes = torch.arange(9).view(1, 3, 3)
    assert again.config.groups == 4
    assert torch.equal(again.decode(codes), model.decode(codes))
    strange = {**model.state_dict(), "groups": torch.tensor(7)}
    with pytest.raises(ParameterError, match="7 groups of 32 channels"):
        read_vqgan(strange)


def test_released_shapes_are_the_defaults():
    with torch.device("meta"):
        model = VQGAN(VQGANConfig())
    assert model.config.scale == 16
    # As the authors count vq_ds16: 72 million parameters.
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == 72


def test_pieces_change_nothing(tiny):
    codes = torch.arange(5 * 64).view(5, 8, 8) % 64
    whole = tiny.decode(codes)
    torch.testing.assert_close(tiny.decode(codes, piece=2), whole, atol=1e-5, rtol=0)
    images = whole.clamp(-1, 1)
    assert torch.equal(tiny.encode(images, piece=1), tiny.encode(images))


def test_where_memory_runs_out_pieces_are_halved():
    tried = []

    def work(rows):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows * 2

    assert in_pieces(work, torch.arange(7)).tolist() == list(range(0, 14, 2))
    assert tried == [7, 4, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        in_pieces(work, torch.arange(7), piece=4)  # a piece that was asked for is kept


def test_pixels_there_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_pixels(from_pixels(pixels)), pixels)
    beyond = torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2).expand(1, 3, 2, 2)
    assert to_pixels(beyond).unique().tolist() == [0, 255]
    assert to_pixels(torch.zeros(1, 3, 8, 8), 4).shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model.decode(torch.zeros(2, 4, dtype=torch.int64)), "B, rows, cols"),
        (lambda model: model.decode(torch.full((1, 4, 4), 64)), "64 of them; is it another"),
        (lambda model: model.encode(torch.zeros(1, 3, 9, 8)), "multiples of 2"),
        (lambda model: model.encode(torch.zeros(1, 8, 8, 3)), "from_pixels"),
        (lambda model: from_pixels(torch.zeros(1, 8, 8, 3)), "uint8"),
    ],
)
def test_wrong_tensors_are_refused(tiny, call, said):
    with pytest.raises(ShapeError, match=said):
        call(tiny)


def test_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "vq.pt"
    torch.save(checkpoint_of(RUNS[0]), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ParameterError, match=r"vq\.pt can't be read as a checkpoint"):
        read_vqgan(path)
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(3, 4)}}, path)
    with pytest.raises(ParameterError, match=r"vq\.pt holds no VQGAN: it has no codebook"):
        read_vqgan(path)
    weights = weights_of(RUNS[2])
    del weights["decoder.up.0.block.0.conv1.weight"]
    with pytest.raises(ParameterError, match=r"levels\.2\.blocks\.0\.conv1\.weight is missing"):
        read_vqgan(weights)
    weights = weights_of(RUNS[0])
    weights["decoder.head.2.weight"] = torch.zeros(3)
    with pytest.raises(ParameterError, match=r"decoder\.head\.2\.weight is unknown"):
        read_vqgan(weights)
    with pytest.raises(FileNotFoundError):
        read_vqgan(tmp_path / "nowhere.ckpt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"model": Runs()}, tmp_path / "vq.ckpt")
    with pytest.raises(ParameterError, match="tensors"):
        read_vqgan(tmp_path / "vq.ckpt")
    assert not (tmp_path / "ran").exists()
