"""Figures of images that a checkpoint draws, as metrics of a subject."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpolicy import CacheStats
from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.image_model import ImageModel, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Metric, Setting
from kvpolicy.lab.score.measures import inception_score
from kvpolicy.lab.score.reference import read_reference
from kvpolicy.lab.score.score import SPLITS, Seen
from kvpolicy_adapters.evaluation.real_images import RealImages
from kvpolicy_adapters.evaluation.scoring.clip import open_clip
from kvpolicy_adapters.evaluation.scoring.inception import open_inception

__all__ = ["DrawnFigures"]

_DISTANCES = (
    Metric(name="fid", label="FID", better="lower", about="of drawn images to real ones"),
    Metric(
        name="inception_score",
        label="inception score",
        better="higher",
        about="of drawn images, mean over ten parts",
    ),
    Metric(
        name="precision",
        label="precision",
        better="higher",
        array="precise",
        about="share of drawn images in the manifold of real ones",
    ),
    Metric(
        name="recall",
        label="recall",
        better="higher",
        array="recalled",
        items="recalled_items",
        about="share of real images in the manifold of drawn ones",
    ),
)
_CLIP = Metric(
    name="clip_score",
    label="CLIP score",
    better="higher",
    array="clip",
    about="100 times the cosine of drawn image and prompt, not below 0",
)
_SPEED = Metric(
    name="images_per_second",
    label="images per second",
    better="higher",
    timing=True,
    about="drawn, pixels included",
)


class DrawnFigures:
    """Draws for the conditions of real images, and compares with those images or with statistics.

    Args:
        count: images of a seed, 10 or more.
        real: whose conditions are drawn, in turn.
        inception: the file of FID's network; None for no distances.
        reference: a folder, or an ``.npz`` of images or statistics; None for the real images.
        clip: the folder of a CLIP; None for no match with prompts.
        device: where the networks compute.

    Raises:
        ParameterError: neither network is given, a file is another, or there are too few images.
    """

    def __init__(
        self,
        count: int,
        real: RealImages,
        *,
        inception: str | None,
        reference: str | None,
        clip: str | None,
        device: str,
    ) -> None:
        if type(count) is not int or count < SPLITS:
            raise ParameterError(f"drawn={count!r} must be a whole number, at least {SPLITS}")
        if inception is None and clip is None:
            raise ParameterError(f"drawn={count}: give inception=FILE, clip=FOLDER or both")
        if inception is None and reference is not None:
            raise ParameterError(f"reference={reference!r} is compared through inception=FILE")
        if clip is not None and real.items[0].prompt is None:
            raise ParameterError(f"clip={clip!r}: classes have no prompts")
        self.count, self.real = count, real
        self._network = None if inception is None else open_inception(Path(inception), device)
        self._clip = None if clip is None else open_clip(Path(clip), device)
        self._given = None if reference is None else read_reference(Path(reference))
        if self._given is not None and self._given.moments is not None:
            features = len(self._given.moments[0])
            if self._network is not None and features != self._network.features:
                raise ParameterError(
                    f"reference={reference!r} holds statistics of {features} features, but "
                    f"inception={inception!r} gives {self._network.features}"
                )
        self._seen: Seen | None = None
        metrics: tuple[Metric, ...] = ()
        if self._network is not None:
            images = self._given is None or self._given.pictures is not None
            metrics += _DISTANCES if images else _DISTANCES[:2]
        if self._clip is not None:
            metrics += (_CLIP,)
        self.metrics = (*metrics, _SPEED)

    def measure(
        self, model: ImageModel, setting: Setting, seed: int, batch: int
    ) -> tuple[dict[str, NDArray[Any]], dict[str, float], CacheStats]:
        """Draw, and give arrays and figures by name, and what a cache cost.

        Raises:
            ParameterError: the reference's images have another size than what is drawn.
        """
        items = self._items(seed)
        drawn: list[NDArray[np.uint8]] = []
        begun = time.perf_counter()
        for first in range(0, self.count, batch):
            done = model.draw(items[first : first + batch], setting, Sampler(), seed)
            drawn.append(done.images)
        figures = {"images_per_second": self.count / (time.perf_counter() - begun)}
        arrays: dict[str, NDArray[Any]] = {}
        if self._network is not None:
            seen = Seen.of(self._network, drawn, "drawn images")
            real, moments = self._reference(drawn[0].shape[1:3], batch)
            figures["fid"] = seen.distance(moments)
            figures["inception_score"] = inception_score(seen.logits, SPLITS)[0]
            if real is not None:
                arrays["precise"] = seen.within(real).numpy()
                arrays["recalled"] = real.within(seen).numpy()
                arrays["recalled_items"] = np.arange(len(real.features))
        if self._clip is not None:
            prompts = iter([str(item.prompt) for item in items])
            cosines = [
                self._clip.match(torch.from_numpy(some), [next(prompts) for _ in some])[0]
                for some in drawn
            ]
            arrays["clip"] = (100 * torch.cat(cosines).clamp(min=0)).double().numpy()
        return arrays, figures, done.stats[0]

    def _items(self, seed: int) -> tuple[Item, ...]:
        conditions = self.real.items
        return tuple(
            Item(f"{number}.png", wanted.row, seed * self.count + number, wanted.prompt)
            for number in range(self.count)
            for wanted in (conditions[number % len(conditions)],)
        )

    def _reference(
        self, size: tuple[int, ...], batch: int
    ) -> tuple[Seen | None, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """What the network says of real images, and moments; computed once."""
        assert self._network is not None  # who calls this has seen to it
        given = self._given
        pictures = None if given is None else given.pictures
        if self._seen is None and (given is None or pictures is not None):
            if pictures is None:
                batches: Iterator[NDArray[np.uint8]] = self._resized(size, batch)
            elif pictures.size != tuple(size):
                raise ParameterError(
                    f"reference {pictures.source} has pictures of {list(pictures.size)} pixels, "
                    f"but {list(size)} are drawn"
                )
            else:
                batches = pictures.batches(batch)
            self._seen = Seen.of(self._network, batches, "real images")
        if given is not None and given.moments is not None:
            return self._seen, given.moments
        assert self._seen is not None  # without moments there are images
        return self._seen, self._seen.moments

    def _resized(self, size: Sequence[int], batch: int) -> Iterator[NDArray[np.uint8]]:
        """All real images, the middle of each, in the size of the drawn ones."""
        total = len(self.real.files)
        for first in range(0, total, batch):
            yield self.real.pixels(first, min(batch, total - first), size[0], size[1]).numpy()
