"""LlamaGen's checkpoints, of classes and of captions, as the authors released them."""

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
from kvpolicy_adapters.evaluation.drawing.caches import CACHES, cost_of, drawing_cache, served
from kvpolicy_adapters.evaluation.drawing.common import (
    chance_of,
    dtype_of,
    needs_class,
    needs_prompt,
    options_of,
)
from kvpolicy_adapters.images.families import layout_of
from kvpolicy_adapters.images.llamagen import LlamaGen, read_official
from kvpolicy_adapters.images.llamagen.captions import (
    Captions,
    StoredCaptions,
    T5Captions,
    pad_left,
)
from kvpolicy_adapters.images.vqgan import VQGAN, from_pixels, to_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan

__all__ = ["LlamaGenImages"]

_CODE_PIXELS = 16
_OPTIONS = ("captions", "grid", "heads", "size", "t5")
#: Captions have a mask over the tokens so far, which a static cache is longer than.
_OF_CAPTIONS = ("kvpolicy", "dynamic")
#: Guidance and limit of the authors' sampling scripts: of classes (who draw from all codes when
#: they evaluate), and of captions.
_CFG = {"c2i": 1.5, "t2i": 7.5}
_TOP_K = {"c2i": 0, "t2i": 1000}


class LlamaGenImages:
    """Draws with a LlamaGen and a VQGAN: classes, or prompts where the checkpoint has captions.

    Args:
        source: ``path``, a checkpoint such as ``c2i_XL_384.pt``, and ``vq``, its decoder. Options:
            of captions ``t5``, a folder of the T5 that embeds them, or ``captions``, one of their
            embeddings (see :mod:`kvpolicy_adapters.images.llamagen.captions`); ``grid``, tokens a
            side (as the file's name says, if none); ``heads``, for a model of no released size;
            ``size``, pixels a side of the pictures, where others are wanted than the decoder gives:
            LlamaGen's evaluation draws 384 and looks at 256; ``cache``, of transformers, to compare
            a policy's with: ``dynamic``, and of classes ``static``.

    Raises:
        ParameterError: a file is not what it should be, or the two don't belong together.
        OSError: a file can't be read.
    """

    name = "llamagen"

    def __init__(self, source: ModelSource) -> None:
        options = options_of(source, {**dict.fromkeys(_OPTIONS), "cache": "kvpolicy"})
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
        classes = self._model.config.condition == "c2i"
        name = f"llamagen of {'classes' if classes else 'captions'}"
        self.cache = served(name, options["cache"], CACHES if classes else _OF_CAPTIONS)
        self._captions = self._read_captions(source, options)
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

    def _read_captions(self, source: ModelSource, options: dict[str, Any]) -> Captions | None:
        """What embeds prompts; None for a model of classes.

        Raises:
            ParameterError: it is missing, or not wanted, or there are two.
        """
        config, t5, stored = self._model.config, options["t5"], options["captions"]
        given = [name for name in ("t5", "captions") if options[name] is not None]
        if config.condition == "c2i":
            if given:
                raise ParameterError(f"{source.path} draws classes; {given[0]} is not wanted")
            return None
        if len(given) != 1:
            raise ParameterError(
                f"{source.path} draws captions, whose embeddings come from a T5: give --option "
                f"t5=FOLDER (FLAN-T5-XL of transformers) or --option captions=FOLDER (of .npy "
                f"files), and {'not both' if given else 'neither is there'}"
            )
        sizes = {"size": config.caption_size, "longest": config.caption_length}
        if stored is not None:
            return StoredCaptions(str(stored), **sizes)
        dtype = dtype_of(source)
        return T5Captions(str(t5), **sizes, device=source.device, dtype=dtype)

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class that the model does not have, or a prompt that it can't be given.

        Raises:
            ParameterError: says which.
        """
        if self._captions is None:
            needs_class(self.name, item, self._model.config.num_classes)
        else:
            self._captions.check(item.row, needs_prompt(self.name, item))

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
        config = self._model.config
        condition, mask = self._condition(items)
        count, top_k = config.grid_size**2, _TOP_K[config.condition]
        own, sampling, chance = chance_of(items, seed, count, setting, sampler, top_k)
        greedy = sampling.temperature == 0
        with drawing_cache(self._model, self.cache, setting, config.length) as cache:
            tokens = self._model.generate(
                condition,
                condition_mask=mask,
                cache=cache,
                cfg_scale=_CFG[config.condition] if sampler.cfg is None else sampler.cfg,
                do_sample=not greedy,
                temperature=1.0 if greedy else sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=chance,
                decoder=setting.decoder,
                sampler=own,
            )
            stats = cost_of(cache)
        return tokens.flatten(1), (stats,)

    @property
    def classes(self) -> int:
        """Classes that it knows.

        Raises:
            ParameterError: it draws captions.
        """
        if self._captions is not None:
            raise ParameterError(
                "this LlamaGen draws captions, and has no classes; give one of classes (c2i)"
            )
        return self._model.config.num_classes

    @property
    def side(self) -> int:
        """Pixels a side of the images that its tokens stand for."""
        return self._model.config.grid_size * self._vqgan.config.scale

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens ``[B, count]`` of images, uint8 ``[B, side, side, 3]``."""
        return self._vqgan.encode(from_pixels(pixels).to(self._device)).flatten(1)

    def _condition(self, items: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
        """Classes ``[B]``; or embeddings ``[B, length, size]`` with the mask of their padding."""
        if self._captions is None:
            return torch.tensor([item.row for item in items], device=self._device), None
        found = [self._captions.embed(item.row, needs_prompt(self.name, item)) for item in items]
        embeddings, mask = pad_left(found, self._model.config.caption_length)
        return embeddings.to(self._device), mask.to(self._device)
