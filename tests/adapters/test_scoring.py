"""Networks that ``kvpolicy score`` looks through: Inception as torch-fidelity has it, and CLIP.

The numbers in ``inception.json`` are what torch-fidelity 0.4.0 gave for weights drawn from a seed,
which are drawn again here; nothing of that package is part of kvpolicy.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from kvpolicy import ParameterError, ShapeError
from kvpolicy_adapters.evaluation.scoring.clip import open_clip
from kvpolicy_adapters.evaluation.scoring.inception import Inception, open_inception, read_inception

ROOT = Path(__file__).parents[2]
RUN = json.loads(Path(__file__).with_name("inception.json").read_text(encoding="utf-8"))


def weights_of(stem, seed):
    """Weights that let images through, by the names of the published file."""
    chance, weights = np.random.default_rng(seed), {}
    with torch.device("meta"):
        shapes = {name: tuple(held.shape) for name, held in Inception(stem).state_dict().items()}
    for name in sorted(shapes):
        drawn = chance.standard_normal(shapes[name], np.float32)
        if len(shapes[name]) == 4:
            drawn *= np.float32(1.6 / np.sqrt(np.prod(shapes[name][1:])))
        elif name.endswith("running_var"):
            drawn = 0.5 + np.abs(drawn)
        elif name.endswith("bn.weight"):
            drawn = 1 + 0.2 * drawn
        else:
            drawn *= np.float32(0.1)
        weights[name] = torch.from_numpy(drawn)
    return weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "inception.pth"
    torch.save(weights_of(2, 1), path)
    return path


def test_it_is_torch_fidelitys(tmp_path):
    path = tmp_path / "weights.pth"
    counts = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(3)}
    torch.save(weights_of(32, RUN["seed"]) | counts, path)
    network = read_inception(path)
    assert network.features == 2048
    assert sum(held.numel() for held in network.parameters()) == RUN["parameters"]
    assert not network.published
    for seen in RUN["images"]:
        chance = np.random.default_rng(seen["seed"])
        image = torch.from_numpy(chance.integers(0, 256, (1, *seen["size"], 3), np.uint8))
        features, logits = network.look(image)
        theirs = torch.tensor(seen["features"])
        assert theirs.std() > 0.1
        torch.testing.assert_close(features[0, ::100], theirs, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            logits[0, ::100], torch.tensor(seen["logits"]), atol=2e-5, rtol=1e-5
        )


def test_an_image_does_not_depend_on_its_batch(tiny):
    network = open_inception(tiny, "cpu")
    images = torch.randint(0, 256, (3, 20, 28, 3), dtype=torch.uint8)
    features, _ = network.look(images)
    torch.testing.assert_close(network.look(images[1:2])[0], features[1:2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeError, match=r"uint8 \[B, H, W, 3\]"):
        network.look(images.movedim(-1, 1))


def test_only_the_published_file_passes_for_it(tiny):
    network = read_inception(tiny)
    assert not network.published
    network.digest = "6726825d" + "0" * 56
    assert network.published


class Runs:
    def __reduce__(self):
        return (Path.touch, (Path("it-ran"),))


def _torchvisions(weights):
    return {**weights, "AuxLogits.fc.weight": torch.zeros(1000, 768)}


def _lacking(weights):
    return {name: held for name, held in weights.items() if "Mixed_7c.branch3x3_2b" not in name}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_torchvisions, r"torchvision's .* AuxLogits\.fc\.weight is unknown"),
        (_lacking, r"Mixed_7c\.branch3x3_2b\.bn\.bias is missing"),
        (lambda _: {"weight": torch.zeros(2)}, r"does not hold the Inception"),
        (lambda _: {"model": Runs()}, "can't be read as a checkpoint of tensors"),
        (lambda weights: list(weights.values()), "holds a list"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, monkeypatch, make, said):
    monkeypatch.chdir(tmp_path)
    torch.save(make(weights_of(2, 1)), tmp_path / "other.pth")
    with pytest.raises(ParameterError, match=rf"(?s)other\.pth.*{said}"):
        read_inception(tmp_path / "other.pth")
    assert not Path("it-ran").exists()


def test_a_file_whose_name_says_another_digest_is_refused(tiny, tmp_path):
    data = tiny.read_bytes()
    own = hashlib.sha256(data).hexdigest()[:8]
    (tmp_path / f"weights-{own}.pth").write_bytes(data)
    assert read_inception(tmp_path / f"weights-{own}.pth").digest.startswith(own)
    published = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    for some in (data, data[:20_000]):
        published.write_bytes(some)
        begins = hashlib.sha256(some).hexdigest()[:8]
        said = rf"6726825d\.pth is not the file .* begins with {begins}, .*\({len(some):,} bytes\)"
        with pytest.raises(ParameterError, match=said):
            read_inception(published)


def test_a_truncated_file_is_refused(tiny, tmp_path):
    (tmp_path / "cut.pth").write_bytes(tiny.read_bytes()[:20_000])
    with pytest.raises(ParameterError, match=r"cut\.pth can't be read"):
        read_inception(tmp_path / "cut.pth")


# --- CLIP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of 28 x 28 pixels that reads 8 tokens, as its folder has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<start>", "<end>", "bag", "boot", "coat"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {"vocab_size": 6, "max_position_embeddings": 8, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 28, "patch_size": 7, "num_attention_heads": 2}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(
        text_config=shape | text | ends, vision_config=shape | vision, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    ).save_pretrained(folder)
    side = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 28},
                "crop_size": side,
            }
        )
    )
    assert CLIPImageProcessorPil.from_pretrained(folder).crop_size["height"] == 28
    return folder


def test_clips_cosines_are_the_models(clip):
    from transformers import CLIPModel

    network = open_clip(clip, "cpu")
    images = torch.randint(0, 256, (3, 28, 28, 3), dtype=torch.uint8)
    cosines, cut = network.match(images, ["bag", "boot coat", "coat " * 9])
    assert (cut, network.longest) == (1, 8)
    model = CLIPModel.from_pretrained(clip).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((images[:2] / 255 - mean) / deviation).movedim(-1, 1)
    ids = torch.tensor([[3, 0], [4, 5]])
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=torch.tensor([[1, 0], [1, 1]]), pixel_values=pixels
        )
    theirs = found.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(cosines[:2], theirs, atol=1e-5, rtol=0)
    assert cosines[0] != cosines[1]


def test_an_image_of_three_rows_has_its_colours(clip):
    """Where channels come first or last can't be told of 3 x 3 pixels by looking."""
    network = open_clip(clip, "cpu")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)
    small, large = (
        network.match(red.expand(1, side, side, 3).contiguous(), ["bag"])[0] for side in (3, 28)
    )
    torch.testing.assert_close(small, large, atol=1e-6, rtol=0)


def test_what_is_no_clip_is_refused_and_nothing_is_fetched(tmp_path, clip, monkeypatch):
    import huggingface_hub.file_download as download

    def fetched(*_, **__):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(download, "http_get", fetched)
    with pytest.raises(ParameterError, match=r"openai/clip.* is no folder; nothing is downloaded"):
        open_clip(Path("openai/clip-vit-base-patch32"), "cpu")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ParameterError, match="type 'llama'"):
        open_clip(tmp_path / "other", "cpu")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(ParameterError, match=r"bare holds no CLIP with its tokenizer"):
        open_clip(tmp_path / "bare", "cpu")


def test_the_command_prints_and_writes_what_was_found(tmp_path, tiny, clip):
    """As an installation would have it, whose entry points are those of pyproject.toml."""
    pytest.importorskip("typer", reason="needs the extra 'lab'")
    from support.pictures import folder_of, pixels
    from typer.testing import CliRunner

    from kvpolicy.cli import app
    from kvpolicy.lab.score.networks import NETWORKS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, value in project["entry-points"][NETWORKS.group].items():
        module, _, made = value.partition(":")
        if name not in NETWORKS.names():
            NETWORKS.add(name, getattr(import_module(module), made))
    prompts = ["bag", "boot coat", "coat " * 9] * 4
    drawn = folder_of(tmp_path / "drawn", pixels(1, 12), prompts)
    real = folder_of(tmp_path / "real", pixels(2, 14))
    options = ["--real", real, "--inception", tiny, "--clip", clip, "--batch", "5"]
    result = CliRunner().invoke(app, ["score", str(drawn), *map(str, options)])
    assert result.exit_code == 0, result.output
    written = json.loads((drawn / "scores.json").read_text())
    found = written["folders"][str(drawn)]
    assert found["fid"]["value"] > 0
    for heading in ("FID", "inception score", "precision", "recall", "CLIP score"):
        assert heading in result.output
    assert f"{found['fid']['value']:.2f}" in result.output
    assert found["prompts_cut"] == 4
    assert written["published"] is False
    assert "compare among themselves only" in written["notes"][0]
    assert len(written["inception"]) == 64
