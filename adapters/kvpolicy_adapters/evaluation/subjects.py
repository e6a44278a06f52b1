"""Subjects that ship: fashion-ar and fashion-lpd, real images without a download."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import StoppingCriteria, StoppingCriteriaList

import kvpolicy
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.compare.frechet import FrechetTo
from kvpolicy.lab.run.subject import Advance, Generated, Measurement, Metric, Scored, Setting, Watch
from kvpolicy_adapters import zoo
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.decode import decode

__all__ = ["FashionAR", "FashionLPD"]

_GREYS, _CLASSES = 16, 10
_SCORE_BATCH = 64
_WATCHED_BATCH = 16
_REAL = {"test": 1000, "calibration": 256}  # images that ship


class FashionAR:
    """The zoo's model of Fashion-MNIST, its held-out images and its classifier.

    A seed scores its own images (seed 0 the first ``scored`` ones, seed 1 the next, and so on, from
    the first again after the last that ships) and draws its own.

    Args:
        scored: real images that are scored, 2 to 1,000 (256 of ``calibration``).
        images: images that are drawn, at least 10.
        split: real images that are scored: ``test``, or ``calibration``, which are others.
        draw_seed: added to the seed of everything drawn, and of nothing that is scored.
        batch: images that are drawn at once, 1 to 250. A pass of a decoder that speculates begins
            behind the slowest of them.

    Raises:
        ParameterError: an argument is out of range.
    """

    name = "fashion-ar"
    draws = True
    class_names = (
        "T-shirt",
        "trousers",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "boot",
    )

    def __init__(
        self,
        scored: int = 256,
        images: int = 200,
        split: str = "test",
        draw_seed: int = 0,
        batch: int = 250,
    ) -> None:
        if split not in _REAL:
            raise ParameterError(f"{self.name}: split={split!r}; {near_matches(str(split), _REAL)}")
        real = _REAL[split]
        for name, value, low, high in (
            ("scored", scored, 2, real),
            ("images", images, 10, 10**6),
            ("draw_seed", draw_seed, 0, 2**31),
            ("batch", batch, 1, 250),
        ):
            if type(value) is not int or not low <= value <= high:
                raise ParameterError(
                    f"{self.name}: {name}={value!r} must be a whole number from {low} to {high}"
                )
        self.scored, self.images, self.split = scored, images, split
        self.draw_seed, self.batch = draw_seed, batch
        self.zoo = zoo.load("fashion-ar")
        self.layout = self.zoo.layout
        self.num_layers = self.zoo.model.config.num_hidden_layers
        self.metrics = (
            Metric(
                name="bits_per_pixel",
                label="bits per pixel",
                better="lower",
                array="bits",
                items="real",
                about="of real held-out images, teacher-forced under the cache",
            ),
            Metric(
                name="frechet",
                label="Fréchet distance",
                better="lower",
                array="features",
                statistic=FrechetTo(*self.reference()),
                about="between classifier features of drawn images and of 10,000 real ones",
            ),
            Metric(
                name="class_accuracy",
                label="class accuracy",
                better="higher",
                array="correct",
                about="share of drawn images in which a classifier sees the class asked for",
            ),
            Metric(
                name="passes",
                label="passes an image",
                array="passes",
                about="of the model over the batch that an image was drawn in",
            ),
            Metric(
                name="images_per_second",
                label="images per second",
                better="higher",
                timing=True,
                about="drawn",
            ),
        )

    def measure(self, setting: Setting, seed: int, wanted: Collection[str]) -> Measurement:
        """Score this seed's real images and draw this seed's own."""
        arrays: dict[str, NDArray[Any]] = {}
        figures, images = {}, None
        drawing = {"frechet", "class_accuracy", "passes", "images_per_second"} & set(wanted)
        if "bits_per_pixel" in wanted or not drawing:
            blocks = _REAL[self.split] // self.scored
            first = seed % blocks * self.scored
            score = self.score(setting, self.scored, _ignore, first=first)
            arrays |= {"bits": score.bits, "real": np.arange(first, first + self.scored)}
            stats, batch = score.stats, (self.scored - 1) % _SCORE_BATCH + 1
        if drawing:
            drawn = self.generate(setting, self.images, self.draw_seed + seed * 1000, _ignore)
            arrays |= {
                "features": drawn.features,
                "correct": drawn.correct,
                "classes": drawn.classes,
                "passes": drawn.passes,
            }
            figures["images_per_second"] = len(drawn.images) / drawn.seconds
            images, stats, batch = drawn.images, drawn.stats, drawn.batch
        return Measurement(arrays, stats, batch, figures, images)

    def trace(self, setting: Setting, seed: int) -> bytes:
        """The decisions on this seed's first two real images, the same for every policy."""
        recording = self.watched(setting, seed, 2, kvpolicy.trace)
        pictures = torch.as_tensor(np.array(self.zoo.images(self._of_seed(seed, 2)[:, 1:])))
        return bytes(recording.finish(pictures).dump())

    def watched(self, setting: Setting, seed: int, images: int, watch: Watch) -> Any:
        """Score this seed's first images while ``watch(cache)`` looks on; what that gave.

        Raises:
            ParameterError: there are not so many images.
        """
        tokens = self._of_seed(seed, images)
        with self._attached(setting) as cache, watch(cache) as seen:
            for some in tokens.split(_WATCHED_BATCH):
                cache.reset()
                self._see(some, cache)
        return seen

    def _of_seed(self, seed: int, images: int) -> Tensor:
        """Tokens of the first real images that a seed scores.

        Raises:
            ParameterError: there are not so many.
        """
        first = seed % (_REAL[self.split] // self.scored) * self.scored
        left = _REAL[self.split] - first
        if not 1 <= images <= left:
            raise ParameterError(
                f"{self.name}: images={images!r} must be a whole number from 1 to {left}, which "
                f"the split {self.split!r} has from seed {seed} on"
            )
        return self._real(first, images)

    @torch.inference_mode()
    def _see(self, tokens: Tensor, cache: Any) -> None:
        """Let all of these tokens come."""
        self.zoo.model(tokens, **cache.as_argument)

    def calibration(self) -> FashionAR:
        """The same model on real images that no test scores."""
        return type(self)(min(self.scored, _REAL["calibration"]), self.images, "calibration")

    def estimate(self, setting: Setting) -> float:
        """Seconds that ``measure`` will take, from a few images scored and a few lines drawn."""
        begun = time.perf_counter()
        self.score(setting, min(16, self.scored), _ignore)
        scoring = (time.perf_counter() - begun) * self.scored / min(16, self.scored)
        batch, tokens = min(self.images, self.batch), 2 * self.layout.cols
        prompt = torch.full((batch, 1), _GREYS)
        begun = time.perf_counter()
        with self._attached(setting) as cache:
            self._draw(prompt, cache, tokens, _ignore, setting.decoder, 0)
        pixels = self.layout.rows * self.layout.cols
        return scoring + (time.perf_counter() - begun) * pixels / tokens * self.images / batch

    def score(self, setting: Setting, images: int, advance: Advance, *, first: int = 0) -> Scored:
        """Teacher-force images of the split from ``first`` on; ``advance`` counts images."""
        bits = []
        for tokens in self._real(first, images).split(_SCORE_BATCH):
            with self._attached(setting) as cache:
                bits.append(self._bits(tokens, cache))
            advance(len(tokens))
        return Scored(torch.cat(bits).numpy(), cache.stats())

    @torch.inference_mode()
    def _bits(self, tokens: Tensor, cache: Any) -> Tensor:
        """Bits per pixel of real images ``[n, 785]``, float64 ``[n]``."""
        logits = self.zoo.model(tokens[:, :-1], **cache.as_argument).logits
        nats = functional.cross_entropy(
            logits.float().transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        return nats.double().mean(1) / math.log(2)

    def _real(self, first: int, images: int) -> Tensor:
        """Tokens of real images of the split, the class first."""
        tokens_of = {"test": self.zoo.test_tokens, "calibration": self.zoo.calibration_tokens}
        return tokens_of[self.split](first + images)[first:]

    def generate(self, setting: Setting, images: int, seed: int, advance: Advance) -> Generated:
        """Draw images of classes 0, 1, … in turn, seeded batch by batch."""
        classes = torch.arange(images) % _CLASSES
        pixels_each = self.layout.rows * self.layout.cols
        drawn, passes = [], []
        seconds = 0.0
        for number, wanted in enumerate(classes.split(self.batch)):
            prompt = wanted[:, None] + _GREYS
            begun = time.perf_counter()
            with self._attached(setting) as cache:
                tokens, count = self._draw(
                    prompt, cache, pixels_each, advance, setting.decoder, seed + number
                )
            seconds += time.perf_counter() - begun
            drawn.append(tokens[:, 1:])
            passes += [count] * len(wanted)
        pixels = torch.cat(drawn)
        return Generated(
            images=np.asarray(self.zoo.images(pixels)),
            features=self.zoo.features(pixels).double().numpy(),
            correct=(self.zoo.classify(pixels) == classes).numpy(),
            classes=classes.numpy(),
            seconds=seconds,
            stats=cache.stats(),
            batch=len(wanted),
            passes=np.array(passes),
        )

    def reference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Feature statistics of the 10,000 real test images."""
        mean, covariance = self.zoo.reference
        return np.asarray(mean, np.float64), np.asarray(covariance, np.float64)

    def _draw(
        self,
        prompt: Tensor,
        cache: Any,
        tokens: int,
        advance: Advance,
        decoder: kvpolicy.Decoder,
        seed: int,
    ) -> tuple[Tensor, int]:
        """Draw grey levels behind a prompt ``[n, 1]``: int64 ``[n, 1 + tokens]``, and passes."""
        model: Any = self.zoo.model
        if not isinstance(decoder, kvpolicy.Sequential):
            drawn = decode(
                model,
                prompt,
                cache,
                tokens,
                decoder=decoder,
                suppress_tokens=range(_GREYS, model.config.vocab_size),
                seed=seed,
                advance=advance,
            )
            return drawn.tokens, drawn.passes
        torch.manual_seed(seed)
        ids: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache.as_argument,
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            suppress_tokens=list(range(_GREYS, model.config.vocab_size)),
            stopping_criteria=StoppingCriteriaList([_Watch(advance)]),
        )
        return ids, tokens

    def _attached(self, setting: Setting) -> Any:
        return attach(
            self.zoo.model, policy=setting.policy, budget=setting.budget, layout=self.layout
        )


class FashionLPD(FashionAR):
    """The zoo's model for any order: ``lpd`` draws many pixels a pass, ``sequential`` row by row.

    Real images are scored in the order in which the decoder draws, given what is cached then.

    Args:
        scored: as of :class:`FashionAR`.
        images: likewise.
        split: likewise.
        draw_seed: likewise.
        batch: images that are drawn at once, 1 to 250.
        cfg: guidance of what is drawn, which doubles the batch; 1 is none.
        temperature: of what is drawn.

    Raises:
        ParameterError: an argument is out of range.
    """

    name = "fashion-lpd"

    def __init__(
        self,
        scored: int = 64,
        images: int = 200,
        split: str = "test",
        draw_seed: int = 0,
        batch: int = 250,
        cfg: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(scored, images, split, draw_seed, batch)
        if isinstance(cfg, bool) or not isinstance(cfg, int | float) or not 1 <= cfg < math.inf:
            raise ParameterError(f"{self.name}: cfg={cfg!r} must be a number, at least 1 (none)")
        self.cfg, self.sampling = cfg, kvpolicy.Sampling(temperature=temperature)
        self.box = zoo.load("fashion-lpd")
        self.num_layers = self.box.model.llama.config.num_hidden_layers

    def layout_under(self, decoder: kvpolicy.Decoder) -> kvpolicy.OrderedLayout:
        """What comes when; see :meth:`kvpolicy_adapters.zoo.FashionLPD.layout`."""
        return self.box.layout(decoder)

    def _see(self, tokens: Tensor, cache: Any) -> None:
        """Let all groups of these images come."""
        self.box.bits(tokens, cache)

    def estimate(self, setting: Setting) -> float:
        """Seconds that ``measure`` will take, from the first passes over a few images."""
        tokens = self._real(0, min(16, self.scored))
        passes = len(self.layout_under(setting.decoder).groups)
        tried = max(1, passes // 8)
        begun = time.perf_counter()
        with self._attached(setting) as cache:
            for _ in islice(self.box.nats(tokens, cache), tried):
                pass
        each = (time.perf_counter() - begun) / tried / len(tokens)
        drawn = self.images * (1 if self.cfg == 1 else 2)
        return each * passes * (self.scored + drawn)

    def _bits(self, tokens: Tensor, cache: Any) -> Tensor:
        """Bits per pixel of real images ``[n, 785]``, float64 ``[n]``."""
        return self.box.bits(tokens, cache)

    def _draw(
        self,
        prompt: Tensor,
        cache: Any,
        tokens: int,
        advance: Advance,
        decoder: kvpolicy.Decoder,
        seed: int,
    ) -> tuple[Tensor, int]:
        """Draw whole images behind a prompt ``[n, 1]``: int64 ``[n, 785]``, and passes."""
        drawn = self.box.decode(
            prompt[:, 0] - _GREYS,
            cache,
            decoder,
            seed=seed,
            cfg_scale=self.cfg,
            sampling=self.sampling,
            advance=advance,
        )
        return torch.cat([prompt, drawn.tokens], dim=1), drawn.passes

    def _attached(self, setting: Setting) -> Any:
        return self.box.attached(setting.policy, setting.budget, self.layout_under(setting.decoder))


def _ignore(count: int) -> None:
    """Progress that nobody watches."""


class _Watch(StoppingCriteria):
    """Never stops; tells how far generation has come."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.advance(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
