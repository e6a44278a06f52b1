"""fashion-ar: an autoregressive model of Fashion-MNIST, real images and a judge, in one object."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load as parse_safetensors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import ParameterError, RasterLayout
from kvpolicy_adapters.zoo.card import ModelCard
from kvpolicy_adapters.zoo.classifier import FashionClassifier, check_pixels
from kvpolicy_adapters.zoo.sealed import CorruptFileError, read_sealed

__all__ = ["FILES", "FashionModel", "pack_pixels", "read_fashion", "unpack_pixels"]

_ROWS, _COLS, _GREYS = 28, 28, 16
_GREY_STEP = 255 // (_GREYS - 1)
#: What the card vouches for.
FILES = (
    "config.json",
    "model.safetensors",
    "classifier.safetensors",
    "reference.safetensors",
    "test_images.safetensors",
    "calibration_images.safetensors",
)


@dataclass(frozen=True)
class FashionModel:
    """A class-conditional image model with what is needed to judge its images.

    A sequence is a class token (16 to 25, or 26 for any class) and 784 pixel tokens (grey levels
    0 to 15), row by row.

    Attributes:
        model: transformers' own Llama, float32, in evaluation mode, without gradients.
        layout: 28 x 28 behind a prefix of one token.
        card: data, licences, training and measurements.
        reference: mean ``[64]`` and covariance ``[64, 64]``, float64, of the features of the
            10,000 real test images.
    """

    model: LlamaForCausalLM = field(repr=False)
    layout: RasterLayout
    card: ModelCard
    reference: tuple[NDArray[np.float64], NDArray[np.float64]] = field(repr=False)
    _classifier: FashionClassifier = field(repr=False)
    _test: Tensor = field(repr=False)
    _calibration: Tensor = field(repr=False)

    def test_tokens(self, n: int) -> Tensor:
        """The first ``n`` real test images: int64 ``[n, 785]``, class token first.

        Raises:
            ParameterError: n is not between 1 and 1,000 (the number that ships).
        """
        if not 1 <= n <= len(self._test):
            raise ParameterError(f"n={n}: between 1 and {len(self._test)} test images ship")
        return self._test[:n].long()

    def calibration_tokens(self, n: int) -> Tensor:
        """The first ``n`` real images to calibrate on, none a test image: int64 ``[n, 785]``.

        Raises:
            ParameterError: n is not between 1 and 256 (the number that ships).
        """
        if not 1 <= n <= len(self._calibration):
            raise ParameterError(
                f"n={n}: between 1 and {len(self._calibration)} calibration images ship"
            )
        return self._calibration[:n].long()

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """The classifier's features, float32 ``[n, 64]``, of pixel tokens ``[n, 784]``.

        Raises:
            ShapeError: the tokens are not ``[n, 784]`` grey levels from 0 to 15.
        """
        return self._classifier.features(pixels)

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """The class, int64 ``[n]`` from 0 to 9, that the classifier sees in pixel tokens.

        Raises:
            ShapeError: the tokens are not ``[n, 784]`` grey levels from 0 to 15.
        """
        return self._classifier(pixels).argmax(1)

    def images(self, pixels: Tensor) -> NDArray[np.uint8]:
        """Pixel tokens ``[n, 784]`` as grey images to look at, uint8 ``[n, 28, 28]``, 0 to 255.

        Raises:
            ShapeError: the tokens are not ``[n, 784]`` grey levels from 0 to 15.
        """
        check_pixels(pixels)
        grey = pixels.to(device="cpu", dtype=torch.uint8) * _GREY_STEP
        images: NDArray[np.uint8] = grey.view(-1, _ROWS, _COLS).numpy()
        return images


def read_fashion(folder: Traversable) -> FashionModel:
    """Read the model from its folder; every file is checked against the card first.

    Raises:
        CorruptFileError: a file is missing or damaged.
    """
    try:
        card = ModelCard.model_validate_json(folder.joinpath("card.json").read_bytes())
    except (OSError, ValueError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            why = f"{field}: {first['msg']}" if field else first["msg"]
        raise CorruptFileError(
            f"{folder.joinpath('card.json')} can't be read ({why}); reinstall kvpolicy"
        ) from error
    data = {name: read_sealed(folder, name, card.files) for name in FILES}
    moments = parse_safetensors(data["reference.safetensors"])
    with torch.random.fork_rng(devices=[]):  # making modules draws; the caller's seed stays
        model = LlamaForCausalLM(LlamaConfig(**json.loads(data["config.json"])))
        classifier = FashionClassifier()
    model.config.dtype = torch.float32  # as loaded; the file holds bfloat16
    model.load_state_dict(parse_safetensors(data["model.safetensors"]))
    classifier.load_state_dict(parse_safetensors(data["classifier.safetensors"]))
    return FashionModel(
        model=model.float().eval().requires_grad_(False),
        layout=RasterLayout(rows=_ROWS, cols=_COLS, prefix=1),
        card=card,
        reference=(moments["mean"].numpy(), moments["covariance"].numpy()),
        _classifier=classifier.eval().requires_grad_(False),
        _test=_tokens(data["test_images.safetensors"]),
        _calibration=_tokens(data["calibration_images.safetensors"]),
    )


def _tokens(packed: bytes) -> Tensor:
    """Images as they are packed, as sequences: uint8 ``[n, 785]``."""
    images = parse_safetensors(packed)
    labels: Tensor = images["labels"][:, None] + _GREYS
    return torch.cat([labels, unpack_pixels(images["pixels"])], dim=1)


def pack_pixels(pixels: Tensor) -> Tensor:
    """Two grey levels a byte, the first in the upper half: uint8 ``[n, 784]`` to ``[n, 392]``."""
    check_pixels(pixels)
    return (pixels[:, 0::2] << 4) | pixels[:, 1::2]


def unpack_pixels(packed: Tensor) -> Tensor:
    """The inverse of ``pack_pixels``: uint8 ``[n, 392]`` to ``[n, 784]``."""
    return torch.stack([packed >> 4, packed & 15], dim=2).flatten(1)
