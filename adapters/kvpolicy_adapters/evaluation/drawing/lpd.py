"""LPD's checkpoints, as the authors released them: images of a class in 20 to 48 passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpolicy import Decoder, OrderedLayout, Parallel, RasterLayout
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
from kvpolicy_adapters.images.lpd import LPD, read_official
from kvpolicy_adapters.images.vqgan import VQGAN, to_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan

__all__ = ["LPDImages"]


class LPDImages:
    """Draws with an LPD of classes and a VQGAN (LlamaGen's, with 16 pixels a code).

    Args:
        source: ``path``, a checkpoint such as ``lpd_l_256.pth``, and ``vq``, its decoder. Options:
            ``heads``, for a model of no released size; ``schedule``, of guidance along an image:
            ``linear`` (the authors', from none up to ``--cfg``) or ``constant``; ``size``, pixels a
            side of the pictures, where others are wanted than the decoder gives.

    Raises:
        ParameterError: a file is not what it should be, or the two don't belong together.
        OSError: a file can't be read.
    """

    name = "lpd"

    def __init__(self, source: ModelSource) -> None:
        options = options_of(source, {"heads": None, "schedule": "linear", "size": None})
        if options["schedule"] not in ("linear", "constant"):
            raise ParameterError(
                f"option schedule={options['schedule']!r} is neither linear nor constant"
            )
        if source.path is None:
            raise ParameterError("lpd: say which checkpoint, e.g. lpd:lpd_l_256.pth")
        if source.vq is None:
            raise ParameterError("lpd: --vq is missing: the decoder's file, vq_ds16_c2i.pt")
        model: Any = read_official(source.path, num_attention_heads=options["heads"])
        self._model: LPD = model.to(source.device, dtype_of(source))
        self._vqgan: VQGAN = read_vqgan(source.vq).to(source.device)
        codes, vocabulary = self._vqgan.config.codes, self._model.config.vocab_size
        if codes != vocabulary:
            raise ParameterError(
                f"{source.vq} has {codes} codes, but {source.path} draws {vocabulary}: they don't "
                f"belong together"
            )
        self._device = source.device
        self._schedule, self._size = options["schedule"], options["size"]
        self.layout: RasterLayout = self._model.config.grid
        self.num_layers = self._model.config.num_hidden_layers

    def layout_under(self, decoder: Decoder) -> OrderedLayout:
        """What comes when.

        Raises:
            ParameterError: the decoder is not ``lpd``.
        """
        if not isinstance(decoder, Parallel):
            raise ParameterError(
                f"LPD draws in groups, and decoder {decoder.label!r} does not; give --decoder "
                f"lpd:passes=20, and --policy near or another that works in any order"
            )
        return decoder.ordered(self.layout)

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class that the model does not have.

        Raises:
            ParameterError: says which.
        """
        needs_class(self.name, item, self._model.config.num_classes)

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, uint8 ``[B, rows, cols, 3]``."""
        classes = torch.tensor([item.row for item in items], device=self._device)
        layout = self.layout_under(setting.decoder)
        _, sampling, chance = chance_of(items, seed, len(layout.order), setting, sampler)
        with attach(
            self._model, policy=setting.policy, budget=setting.budget, layout=layout
        ) as cache:
            tokens = self._model.generate(
                classes,
                cache=cache,
                cfg_scale=1.0 if sampler.cfg is None else sampler.cfg,
                cfg_schedule=self._schedule,
                sampling=sampling,
                seed=chance,
            )
            stats = cache.stats()
        images = to_pixels(self._vqgan.decode(tokens), self._size)
        return Drawn(images.numpy(), (stats,))
