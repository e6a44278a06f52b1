"""Subjects that a user brings: checkpoints of image models, scored on a folder of real images.

An image is encoded by the model's own tokenizer, and its tokens are fed to the model under the
policy, each predicted from what the cache still holds. Guidance, temperature and limits are off:
the figure is of the model's distribution. Where real images and the file of a network are given,
images are drawn too, and compared with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpolicy import CacheStats, RasterLayout
from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.image_model import ImageModel, ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.device import check_device
from kvpolicy.lab.run.subject import Measurement, Metric, Setting
from kvpolicy_adapters.evaluation.drawing.checkpoint import open_checkpoint
from kvpolicy_adapters.evaluation.drawing.forced import TeacherForced
from kvpolicy_adapters.evaluation.drawing.llamagen import LlamaGenImages
from kvpolicy_adapters.evaluation.drawn_figures import DrawnFigures
from kvpolicy_adapters.evaluation.real_images import RealImages, read_real_images

__all__ = ["CheckpointSubject", "chameleon", "emu3", "janus", "llamagen"]

#: Nothing but the model's own distribution.
_PLAIN = Sampler(cfg=1.0, temperature=1.0, top_k=0, top_p=1.0)


class Encodes(ImageModel, Protocol):
    """An image model that also reads images."""

    def tokens(
        self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int
    ) -> tuple[Tensor, tuple[CacheStats, ...]]:
        """Draw tokens ``[B, count]``, by the setting's decoder."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens ``[B, count]`` of images, uint8 ``[B, rows, cols, 3]``."""


class CheckpointSubject:
    """A checkpoint on real images: bits per code, teacher-forced under the cache.

    A seed scores its own images: seed 0 the first ``scored`` ones, seed 1 the next, and so on, from
    the first again behind the last.

    Args:
        model: draws and encodes.
        layout: of one image, without its prompt.
        size: rows and columns of pixels that the model encodes.
        real: images, with their classes or prompts.
        scored: images of a seed, at least 2.
        batch: images at a time.
        drawn: what is drawn besides, and how it is judged; None for nothing.

    Raises:
        ParameterError: an option is out of range, the folder holds fewer images, or a prompt is too
            long for the model.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        model: Encodes,
        layout: RasterLayout,
        size: tuple[int, int],
        real: RealImages,
        *,
        scored: int,
        batch: int,
        drawn: DrawnFigures | None = None,
    ) -> None:
        for name, value, low in (("scored", scored, 2), ("batch", batch, 1)):
            if type(value) is not int or value < low:
                raise ParameterError(
                    f"{model.name}: {name}={value!r} must be a whole number, at least {low}"
                )
        if scored > len(real.items):
            raise ParameterError(
                f"{model.name}: scored={scored}, but {real.folder} holds {len(real.items)} images"
            )
        for item in real.items:
            model.check(item, _PLAIN)
        self.model, self.layout, self.size, self.real = model, layout, size, real
        self.name, self.num_layers = model.name, model.num_layers
        self.scored, self.batch, self.drawn = scored, batch, drawn
        self.draws = drawn is not None
        self.metrics = (
            Metric(
                name="bits_per_code",
                label="bits per code",
                better="lower",
                array="bits",
                items="real",
                about="of real images, teacher-forced under the cache, without guidance",
            ),
            Metric(
                name="codes_per_second",
                label="codes per second",
                better="higher",
                timing=True,
                about="scored, several a pass: not the speed of drawing",
            ),
            *(() if drawn is None else drawn.metrics),
        )
        self._encoded: dict[int, Tensor] = {}

    def measure(self, setting: Setting, seed: int, wanted: Collection[str]) -> Measurement:
        """Score this seed's images, and draw its own where that is asked for."""
        arrays: dict[str, NDArray[Any]] = {}
        figures: dict[str, float] = {}
        stats, batch = None, self.batch
        draws = self.drawn is not None and {metric.name for metric in self.drawn.metrics} & {
            *wanted
        }
        if not draws or {"bits_per_code", "codes_per_second"} & {*wanted}:
            arrays, figures, stats, batch = self._score(setting, seed)
        if draws and self.drawn is not None:
            found, more, stats = self.drawn.measure(self.model, setting, seed, self.batch)
            arrays, figures = arrays | found, figures | more
            batch = (self.drawn.count - 1) % self.batch + 1
        assert stats is not None  # one of the two has been done
        return Measurement(arrays, stats, batch, figures)

    def _score(
        self, setting: Setting, seed: int
    ) -> tuple[dict[str, NDArray[Any]], dict[str, float], CacheStats, int]:
        """Arrays and figures of this seed's real images, and the last batch's cost and size."""
        first = seed % (len(self.real.items) // self.scored) * self.scored
        bits: list[NDArray[np.float64]] = []
        seconds, codes = 0.0, self.layout.rows * self.layout.cols
        for start in range(first, first + self.scored, self.batch):
            count = min(self.batch, first + self.scored - start)
            forced = TeacherForced(tokens=self._tokens(start, count))
            begun = time.perf_counter()
            _, stats = self.model.tokens(
                self.real.items[start : start + count],
                Setting(setting.policy, setting.budget, forced),
                _PLAIN,
                0,
            )
            seconds += time.perf_counter() - begun
            bits.append((forced.nats.sum(1) / (codes * math.log(2))).numpy())
        arrays = {"bits": np.concatenate(bits), "real": np.arange(first, first + self.scored)}
        return arrays, {"codes_per_second": self.scored * codes / seconds}, stats[0], count

    def estimate(self, setting: Setting) -> float:
        """Seconds that ``measure`` will take, from one batch."""
        count = min(self.batch, self.scored)
        tokens = self._tokens(0, count)
        begun = time.perf_counter()
        forced = Setting(setting.policy, setting.budget, TeacherForced(tokens=tokens))
        self.model.tokens(self.real.items[:count], forced, _PLAIN, 0)
        return (time.perf_counter() - begun) * self.scored / count

    def _tokens(self, first: int, count: int) -> Tensor:
        """Tokens of real images ``[count, tokens]``; each image is encoded once."""
        missing = [n for n in range(first, first + count) if n not in self._encoded]
        if missing:
            pixels = torch.cat([self.real.pixels(n, 1, *self.size) for n in missing])
            self._encoded.update(zip(missing, self.model.encode(pixels).cpu(), strict=True))
        return torch.stack([self._encoded[n] for n in range(first, first + count)])


def llamagen(
    checkpoint: str,
    vq: str,
    images: str,
    grid: int | None = None,
    heads: int | None = None,
    scored: int = 64,
    batch: int = 16,
    device: str = "cpu",
    dtype: str | None = None,
    drawn: int = 0,
    inception: str | None = None,
    reference: str | None = None,
    size: int | None = None,
) -> CheckpointSubject:
    """LlamaGen's class-conditional checkpoint on images of classes.

    Args:
        checkpoint: ``c2i_XL_384.pt``.
        vq: ``vq_ds16_c2i.pt``.
        images: folder with a folder a class, or with an ``index.jsonl``.
        grid: tokens a side, where the checkpoint's name does not say it.
        heads: for a model of no released size.
        scored: images of a seed.
        batch: images at a time.
        device: where to compute.
        dtype: of the weights; bfloat16 on a GPU if none.
        drawn: images that are drawn for each seed, for the conditions of the real ones; 0 for none.
        inception: file of FID's network, for FID, inception score, precision and recall.
        reference: folder or ``.npz`` that FID is to; the real images, resized, if none.
        size: pixels a side of what is drawn, where a reference has others.

    Raises:
        ParameterError: a file is not what it should be; the message names it.
    """
    check_device(device)
    options = tuple(
        (n, v) for n, v in (("grid", grid), ("heads", heads), ("size", size)) if v is not None
    )
    source = ModelSource("llamagen", checkpoint, vq, device, dtype, options)
    model = LlamaGenImages(source)
    layout = model.layout
    assert isinstance(layout, RasterLayout)
    real = read_real_images(images, model.classes)
    sides = (model.side, model.side)
    figures = _figures(real, (drawn, inception, reference, None), device)
    return CheckpointSubject(model, layout, sides, real, scored=scored, batch=batch, drawn=figures)


def janus(
    checkpoint: str,
    images: str,
    scored: int = 64,
    batch: int = 16,
    device: str = "cpu",
    dtype: str | None = None,
    drawn: int = 0,
    inception: str | None = None,
    reference: str | None = None,
    clip: str | None = None,
) -> CheckpointSubject:
    """A Janus-Pro of transformers on images with prompts.

    Args:
        checkpoint: folder, or name on the hub.
        images: folder with a text beside each image, or with an ``index.jsonl``.
        scored: images of a seed.
        batch: images at a time.
        device: where to compute.
        dtype: of the weights; bfloat16 on a GPU if none.
        drawn: images that are drawn for each seed, for the conditions of the real ones; 0 for none.
        inception: file of FID's network, for FID, inception score, precision and recall.
        reference: folder or ``.npz`` that FID is to; the real images, resized, if none.
        clip: folder of a CLIP, for the CLIP score.

    Raises:
        ParameterError: a file is not what it should be; the message names it.
    """
    judged = (drawn, inception, reference, clip)
    return _prompted("janus", checkpoint, None, images, scored, batch, device, dtype, judged)


def chameleon(
    checkpoint: str,
    vq: str,
    images: str,
    pixels: int | None = None,
    scored: int = 32,
    batch: int = 4,
    device: str = "cpu",
    dtype: str | None = None,
    drawn: int = 0,
    inception: str | None = None,
    reference: str | None = None,
    clip: str | None = None,
) -> CheckpointSubject:
    """Lumina-mGPT or Anole on images with prompts.

    Args:
        checkpoint: folder, or name on the hub.
        vq: ``vqgan.ckpt``.
        images: folder with a text beside each image, or with an ``index.jsonl``.
        pixels: side of Lumina-mGPT's image, where the checkpoint's name does not say it.
        scored: images of a seed.
        batch: images at a time.
        device: where to compute.
        dtype: of the weights; bfloat16 on a GPU if none.
        drawn: images that are drawn for each seed, for the conditions of the real ones; 0 for none.
        inception: file of FID's network, for FID, inception score, precision and recall.
        reference: folder or ``.npz`` that FID is to; the real images, resized, if none.
        clip: folder of a CLIP, for the CLIP score.

    Raises:
        ParameterError: a file is not what it should be; the message names it.
    """
    options = () if pixels is None else (("pixels", pixels),)
    judged = (drawn, inception, reference, clip)
    return _prompted(
        "chameleon", checkpoint, vq, images, scored, batch, device, dtype, judged, options
    )


def emu3(
    checkpoint: str,
    images: str,
    scored: int = 16,
    batch: int = 1,
    device: str = "cpu",
    dtype: str | None = None,
    drawn: int = 0,
    inception: str | None = None,
    reference: str | None = None,
    clip: str | None = None,
) -> CheckpointSubject:
    """Emu3 on images with prompts.

    Args:
        checkpoint: folder, or name on the hub.
        images: folder with a text beside each image, or with an ``index.jsonl``.
        scored: images of a seed.
        batch: images at a time.
        device: where to compute.
        dtype: of the weights; bfloat16 on a GPU if none.
        drawn: images that are drawn for each seed, for the conditions of the real ones; 0 for none.
        inception: file of FID's network, for FID, inception score, precision and recall.
        reference: folder or ``.npz`` that FID is to; the real images, resized, if none.
        clip: folder of a CLIP, for the CLIP score.

    Raises:
        ParameterError: a file is not what it should be; the message names it.
    """
    judged = (drawn, inception, reference, clip)
    return _prompted("emu3", checkpoint, None, images, scored, batch, device, dtype, judged)


#: What a checkpoint's own name for itself may be, by subject.
_NAMES: dict[str, tuple[str, ...]] = {
    "janus": ("janus",),
    "chameleon": ("lumina-mgpt", "anole"),
    "emu3": ("emu3",),
}


def _prompted(
    name: str,
    checkpoint: str,
    vq: str | None,
    images: str,
    scored: int,
    batch: int,
    device: str,
    dtype: str | None,
    judged: tuple[int, str | None, str | None, str | None],
    options: tuple[tuple[str, Any], ...] = (),
    open_model: Callable[[ModelSource], Any] = open_checkpoint,
) -> CheckpointSubject:
    check_device(device)
    real = read_real_images(images, None)
    model = open_model(ModelSource("checkpoint", checkpoint, vq, device, dtype, options))
    if model.name not in _NAMES[name]:
        raise ParameterError(
            f"subject {name!r}: checkpoint={checkpoint!r} is a {model.name}; its subject is "
            f"{next(key for key, names in _NAMES.items() if model.name in names)!r}"
        )
    figures = _figures(real, judged, device)
    return prompted_subject(model, real, scored=scored, batch=batch, drawn=figures)


def _figures(
    real: RealImages, judged: tuple[int, str | None, str | None, str | None], device: str
) -> DrawnFigures | None:
    """What is drawn and how it is judged: count, network, reference and CLIP, as options say."""
    drawn, inception, reference, clip = judged
    if drawn == 0:
        named = ("inception", inception), ("reference", reference), ("clip", clip)
        for name, value in named:
            if value is not None:
                raise ParameterError(f"{name}={value!r} judges drawn images; give drawn=1000, too")
        return None
    return DrawnFigures(
        drawn, real, inception=inception, reference=reference, clip=clip, device=device
    )


def prompted_subject(
    model: Any, real: RealImages, *, scored: int, batch: int, drawn: DrawnFigures | None = None
) -> CheckpointSubject:
    """The subject of an image model that takes prompts, opened already."""
    if model.name == "emu3":
        layout: RasterLayout = model.grid(real.items[0])
        size = (layout.rows * model.scale, layout.cols * model.scale)
    else:
        size = (model.side, model.side)
        layout = model.image_layout
    return CheckpointSubject(model, layout, size, real, scored=scored, batch=batch, drawn=drawn)
