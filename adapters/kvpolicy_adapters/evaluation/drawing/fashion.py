"""fashion-ar and fashion-lpd, the models that ship: 28 x 28 grey pixels of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvpolicy import Decoder, OrderedLayout
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.draw.image_model import Drawn, ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters import zoo
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.evaluation.drawing.common import (
    chance_of,
    draw_tokens,
    needs_class,
    options_of,
)
from kvpolicy_adapters.evaluation.subjects import FashionAR

__all__ = ["FashionImages", "FashionLPDImages"]

_GREYS = 16


class FashionImages:
    """Draws with fashion-ar: classes 0 to 9, or prompts that are the names of its classes.

    Args:
        source: where it computes; it has no files and no options.

    Raises:
        ParameterError: a file, a dtype or an option is given.
    """

    name = "fashion-ar"
    class_names = FashionAR.class_names

    def __init__(self, source: ModelSource) -> None:
        options_of(source, {})
        for field in ("path", "vq"):
            if (value := getattr(source, field)) is not None:
                raise ParameterError(
                    f"{self.name} ships with its weights; {field}={value!r} is not"
                )
        if source.dtype not in (None, "float32"):
            raise ParameterError(f"{self.name} computes in float32, not dtype={source.dtype!r}")
        self._zoo = zoo.load("fashion-ar")
        model: Any = self._zoo.model
        self._model = model.to(source.device)
        self._device = source.device
        self.layout = self._zoo.layout
        self.num_layers = self._model.config.num_hidden_layers

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class or a name that it does not know, and guidance, for which it is too small.

        Raises:
            ParameterError: says which.
        """
        if sampler.cfg not in (None, 1):
            raise ParameterError(
                f"fashion-ar is drawn from without guidance; cfg={sampler.cfg}; fashion-lpd takes "
                f"it, with --decoder lpd:passes=48"
            )
        self._class(item)

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, grey uint8 ``[B, 28, 28]``; see :class:`kvpolicy.lab.draw.image_model`."""
        classes = torch.tensor([self._class(item) for item in items], device=self._device)
        prompt = classes[:, None] + _GREYS
        pixels = self.layout.rows * self.layout.cols
        model = self._model
        with attach(
            model, policy=setting.policy, budget=setting.budget, layout=self.layout
        ) as cache:
            tokens = draw_tokens(
                model,
                prompt,
                [cache],
                items,
                pixels,
                setting,
                sampler,
                seed,
                suppress_tokens=range(_GREYS, model.config.vocab_size),
            )
            stats = cache.stats()
        return Drawn(np.asarray(self._zoo.images(tokens.cpu())), (stats,))

    def _class(self, item: Item) -> int:
        if item.prompt is None:
            needs_class(self.name, item, len(self.class_names))
            return item.row
        if item.prompt not in self.class_names:
            known = near_matches(item.prompt, self.class_names)
            raise ParameterError(
                f"prompt {item.row}: {self.name} knows no {item.prompt!r}; {known}"
            )
        return self.class_names.index(item.prompt)


class FashionLPDImages(FashionImages):
    """Draws with fashion-lpd, in the order of the decoder: ``lpd``, or ``sequential`` row by row.

    Args:
        source: as of :class:`FashionImages`.

    Raises:
        ParameterError: a file, a dtype or an option is given.
    """

    name = "fashion-lpd"

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        self._box = zoo.load("fashion-lpd")
        self._box.model.to(source.device)
        self.num_layers = self._box.model.llama.config.num_hidden_layers

    def layout_under(self, decoder: Decoder) -> OrderedLayout:
        """What comes when; see :meth:`kvpolicy_adapters.zoo.FashionLPD.layout`."""
        return self._box.layout(decoder)

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class or a name that it does not know.

        Raises:
            ParameterError: says which.
        """
        self._class(item)

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, grey uint8 ``[B, 28, 28]``; see :class:`kvpolicy.lab.draw.image_model`."""
        classes = torch.tensor([self._class(item) for item in items], device=self._device)
        layout = self._box.layout(setting.decoder)
        own, sampling, chance = chance_of(items, seed, len(layout.order), setting, sampler)
        with self._box.attached(setting.policy, setting.budget, layout) as cache:
            drawn = self._box.decode(
                classes,
                cache,
                setting.decoder,
                seed=chance,
                cfg_scale=1.0 if sampler.cfg is None else sampler.cfg,
                sampling=sampling,
                rules=() if own is None else (own,),
            )
            stats = cache.stats()
        return Drawn(np.asarray(self._zoo.images(drawn.tokens.cpu())), (stats,))
