"""clipart-ar: pictures in colour from words, one VQ code a token, and drawings it has not seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load as parse_safetensors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from kvpolicy import ParameterError, RasterLayout
from kvpolicy_adapters.images.vqgan import VQGAN, to_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan
from kvpolicy_adapters.zoo.clipart_tokens import SIDE, ClipartTokens
from kvpolicy_adapters.zoo.sealed import CorruptFileError, read_sealed

__all__ = [
    "CLIPART_FILES",
    "ClipartCard",
    "ClipartGrammar",
    "ClipartModel",
    "open_clipart",
    "read_clipart",
]

#: What the card vouches for.
CLIPART_FILES = (
    "config.json",
    "model.safetensors",
    "vqgan.safetensors",
    "drawings.json",
    "drawings.safetensors",
)


class ClipartCard(BaseModel):
    """The facts of clipart-ar's ``card.json``; the prose is in ``MODEL_CARD.md`` beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    parameters: int = Field(description="numbers in the weights, without the VQGAN's")
    vqgan_parameters: int
    data: str
    data_licence: str
    weights_licence: str
    steps: int = Field(description="optimiser steps of training")
    batch: int = Field(description="pictures a step")
    training_minutes: float = Field(description="wall clock spent in steps")
    vqgan_steps: int = Field(description="optimiser steps of the VQGAN's training, eight a step")
    machine: str
    bits_per_code: float = Field(
        description="mean of −log2 p over the codes of the held-out drawings, words given, full "
        "cache, without line breaks"
    )
    bits_per_code_line_breaks: float = Field(description="the same with line breaks")
    bits_per_code_20: float = Field(
        description="bits_per_code of the first 20 held-out drawings alone"
    )
    bits_of_counting: dict[str, float] = Field(
        description="what counting gives: a code by itself, and behind its neighbours"
    )
    reconstruction_error: float = Field(
        description="mean absolute error of the VQGAN on held-out drawings, of 256 levels"
    )
    reconstruction_psnr: float = Field(description="its peak signal to noise ratio, in dB")
    files: dict[str, str] = Field(description="SHA-256 of each file beside the card")


@dataclass(frozen=True)
class ClipartModel:
    """A model of clip art, of 96 x 96 pixels in 24 x 24 codes, that draws a prompt's words.

    It has learned two grids, without and with a line-break token behind each row; see
    :mod:`kvpolicy_adapters.zoo.clipart_tokens`.

    Attributes:
        model: transformers' own Llama, float32, in evaluation mode, without gradients.
        tokens: what each token means, and how prompts become tokens.
        vqgan: codes to pixels and back.
        card: data, licences, training and measurements.
    """

    model: LlamaForCausalLM = field(repr=False)
    tokens: ClipartTokens = field(repr=False)
    vqgan: VQGAN = field(repr=False)
    card: ClipartCard
    _words: Mapping[str, Sequence[Sequence[str]]] = field(repr=False)
    _codes: Mapping[str, Tensor] = field(repr=False)

    def layout(self, *, line_breaks: bool = False) -> RasterLayout:
        """24 x 24 codes behind a prefix of nine tokens."""
        return self.tokens.layout(line_breaks)

    def prompts(self, prompts: Sequence[str], *, line_breaks: bool = False) -> Tensor:
        """Prefixes of prompts, int64 ``[n, 9]``.

        Raises:
            ParameterError: one has no words, more than eight, or words that the model does not
                know.
        """
        words = [self.tokens.words(prompt) for prompt in prompts]
        return torch.tensor([self.tokens.prefix(some, line_breaks=line_breaks) for some in words])

    def unconditional(self, *, line_breaks: bool = False) -> Tensor:
        """The prefix that says nothing, int64 ``[1, 9]``: what guidance leads away from."""
        return torch.tensor([self.tokens.prefix((), line_breaks=line_breaks)])

    def test_tokens(self, n: int, *, line_breaks: bool = False) -> Tensor:
        """The first ``n`` drawings that were held out: int64 ``[n, 585]`` (``[n, 609]``).

        Raises:
            ParameterError: n is not between 1 and the number that there are (400).
        """
        return self._drawings("test", n, line_breaks)

    def calibration_tokens(self, n: int, *, line_breaks: bool = False) -> Tensor:
        """The first ``n`` drawings to calibrate on, none trained on, and none a test drawing.

        Raises:
            ParameterError: n is not between 1 and the number that there are (200).
        """
        return self._drawings("calibration", n, line_breaks)

    def said(self, split: str) -> list[str]:
        """The words of all drawings of ``test`` or ``calibration``, as prompts."""
        return [" ".join(words) for words in self._words[split]]

    def grammar(self, *, line_breaks: bool = False) -> ClipartGrammar:
        """What may come where, as a logits processor of ``generate`` or a rule of ``decode``."""
        return ClipartGrammar(self.tokens, line_breaks)

    def images(self, tokens: Tensor, *, line_breaks: bool = False) -> NDArray[np.uint8]:
        """Tokens of pictures ``[n, 576]`` (``[n, 600]``) as uint8 ``[n, 96, 96, 3]``.

        Raises:
            ShapeError: they are of another number, or one of them is no code.
        """
        codes = self.tokens.codes_of(tokens, line_breaks=line_breaks)
        pixels: NDArray[np.uint8] = to_pixels(self.vqgan.decode(codes)).numpy()
        return pixels

    def _drawings(self, split: str, n: int, line_breaks: bool) -> Tensor:
        codes, words = self._codes[split], self._words[split]
        if not 1 <= n <= len(codes):
            raise ParameterError(f"n={n}: between 1 and {len(codes)} {split} drawings are there")
        picture = self.tokens.picture(codes[:n].long(), line_breaks=line_breaks)
        prompts = [self.tokens.prefix(some, line_breaks=line_breaks) for some in words[:n]]
        return torch.cat([torch.tensor(prompts), picture], dim=1)


class ClipartGrammar(LogitsProcessor):
    """Lets codes come, and a line break behind each row where there are such.

    Args:
        tokens: what they mean.
        line_breaks: whether rows end with one.
    """

    def __init__(self, tokens: ClipartTokens, line_breaks: bool) -> None:
        self._tokens, self._layout = tokens, tokens.layout(line_breaks)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, vocabulary]`` in which what can't come is ``-inf``."""
        column = (input_ids.shape[1] - self._layout.prefix) % self._layout.line_length
        masked = torch.full_like(scores, -torch.inf)
        if column == SIDE:
            masked[:, self._tokens.line_break] = 0.0
        else:
            masked[:, : self._tokens.codes] = scores[:, : self._tokens.codes]
        return masked


def open_clipart(folder: str | None) -> ClipartModel:
    """The model that ships, or one of a folder that ``examples/training/pack_clipart_ar.py`` wrote.

    Raises:
        ParameterError: the folder holds no clipart-ar.
        CorruptFileError: one of its files is missing or damaged.
    """
    if folder is None:
        return read_clipart(files("kvpolicy_adapters.zoo").joinpath("clipart_ar"))
    if not Path(folder, "card.json").is_file():
        raise ParameterError(
            f"{folder} holds no clipart-ar: no card.json; leave it out for the one that ships, or "
            f"give the folder that examples/training/pack_clipart_ar.py writes"
        )
    return read_clipart(Path(folder))


def read_clipart(folder: Traversable) -> ClipartModel:
    """Read the model from its folder; every file is checked against the card first.

    Raises:
        CorruptFileError: a file is missing or damaged.
    """
    try:
        card = ClipartCard.model_validate_json(folder.joinpath("card.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptFileError(
            f"{folder.joinpath('card.json')} can't be read ({error}); reinstall kvpolicy"
        ) from error
    data = {name: read_sealed(folder, name, card.files) for name in CLIPART_FILES}
    drawings: dict[str, Any] = json.loads(data["drawings.json"])
    vqgan = read_vqgan(parse_safetensors(data["vqgan.safetensors"])).float()
    with torch.random.fork_rng(devices=[]):  # making modules draws; the caller's seed stays
        model = LlamaForCausalLM(LlamaConfig(**json.loads(data["config.json"])))
    model.config.dtype = torch.float32  # as loaded; the file holds bfloat16
    model.load_state_dict(parse_safetensors(data["model.safetensors"]))
    return ClipartModel(
        model=model.float().eval().requires_grad_(False),
        tokens=ClipartTokens(drawings["vocabulary"], vqgan.config.codes),
        vqgan=vqgan,
        card=card,
        _words={split: drawings[split] for split in ("test", "calibration")},
        _codes=parse_safetensors(data["drawings.safetensors"]),
    )
