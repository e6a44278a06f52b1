"""LlamaGen's class-conditional checkpoints, as the authors released them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy import CacheStats
from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.image_model import Drawn, ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.evaluation.drawing.common import (
    chance_of,
    dtype_of,
    needs_class,
    options_of,
)
from kvpolicy_adapters.images.families import layout_of
from kvpolicy_adapters.images.llamagen import LlamaGen, read_official
from kvpolicy_adapters.images.vqgan import VQGAN, from_pixels, to_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan

__all__ = ["LlamaGenImages"]

_CODE_PIXELS = 16
#: Guidance of the authors' sampling script, which none of these fields changes.
_CFG = 1.5


class LlamaGenImages:
    """Draws with a LlamaGen of classes and a VQGAN.

    Args:
        source: ``path``, a checkpoint such as ``c2i_XL_384.pt``, and ``vq``, its decoder. Options:
            ``grid``, tokens a side (as the file's name says, if none); ``heads``, for a model of
            no released size; ``size``, pixels a side of the pictures, where others are wanted than
            the decoder gives: LlamaGen's evaluation draws 384 and looks at 256.

    Raises:
        ParameterError: a file is not what it should be, or the two don't belong together.
        OSError: a file can't be read.
    """

    name = "llamagen"

    def __init__(self, source: ModelSource) -> None:
        options = options_of(source, {"grid": None, "heads": None, "size": None})
        if source.path is None:
            raise ParameterError("llamagen: say which checkpoint, e.g. llamagen:c2i_XL_384.pt")
        if source.vq is None:
            raise ParameterError("llamagen: --vq is missing: the decoder's file, vq_ds16_c2i.pt")
        grid = options["grid"]
        if grid is None:
            pixels = re.search(r"_(256|384|512)\b", Path(source.path).stem)
            if pixels is None:
                raise ParameterError(
                    f"{source.path}: its name does not say how large its images are; give "
                    f"--option grid=16 (256 pixels), 24 (384) or 32 (512)"
                )
            grid = int(pixels[1]) // _CODE_PIXELS
        model: Any = read_official(
            source.path, grid_size=grid, num_attention_heads=options["heads"]
        )
        self._model: LlamaGen = model.to(source.device, dtype_of(source))
        if self._model.config.condition != "c2i":
            raise ParameterError(
                f"{source.path} draws captions (t2i), whose embeddings come from another model; "
                f"kvpolicy draw serves LlamaGen's c2i checkpoints; for this one, give embeddings "
                f"to kvpolicy_adapters.images.llamagen's generate()"
            )
        self._vqgan: VQGAN = read_vqgan(source.vq).to(source.device)
        codes, vocabulary = self._vqgan.config.codes, self._model.config.vocab_size
        if codes != vocabulary:
            raise ParameterError(
                f"{source.vq} has {codes} codes, but {source.path} draws {vocabulary}: they don't "
                f"belong together"
            )
        self._device = source.device
        self._size: int | None = options["size"]
        self.layout = layout_of(self._model)
        self.num_layers = self._model.config.num_hidden_layers

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class that the model does not have.

        Raises:
            ParameterError: says which.
        """
        needs_class(self.name, item, self._model.config.num_classes)

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, uint8 ``[B, rows, cols, 3]``."""
        tokens, stats = self.tokens(items, setting, sampler, seed)
        grid = self._model.config.grid_size
        images = self._vqgan.decode(tokens.view(-1, grid, grid))
        return Drawn(to_pixels(images, self._size).numpy(), stats)

    def tokens(
        self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int
    ) -> tuple[Tensor, tuple[CacheStats, ...]]:
        """Draw a batch's tokens, int64 ``[B, count]``, and say what the cache cost."""
        classes = torch.tensor([item.row for item in items], device=self._device)
        count = self._model.config.grid_size**2
        own, sampling, chance = chance_of(items, seed, count, setting, sampler)
        greedy = sampling.temperature == 0
        with attach(self._model, policy=setting.policy, budget=setting.budget) as cache:
            tokens = self._model.generate(
                classes,
                **cache.as_argument,
                cfg_scale=_CFG if sampler.cfg is None else sampler.cfg,
                do_sample=not greedy,
                temperature=1.0 if greedy else sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=chance,
                decoder=setting.decoder,
                sampler=own,
            )
            stats = cache.stats()
        return tokens.flatten(1), (stats,)

    @property
    def classes(self) -> int:
        """Classes that it knows."""
        return self._model.config.num_classes

    @property
    def side(self) -> int:
        """Pixels a side of the images that its tokens stand for."""
        return self._model.config.grid_size * self._vqgan.config.scale

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens ``[B, count]`` of images, uint8 ``[B, side, side, 3]``."""
        return self._vqgan.encode(from_pixels(pixels).to(self._device)).flatten(1)
