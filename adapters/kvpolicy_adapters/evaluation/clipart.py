"""The subject clipart-ar: drawings in colour, in VQ codes, from words."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

import kvpolicy
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.run.subject import Advance, Measurement, Metric, Scored, Setting, Watch
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.decode import decode
from kvpolicy_adapters.images.guidance import Guidance, guided
from kvpolicy_adapters.zoo.clipart import open_clipart

__all__ = ["ClipartAR"]

_SCORE_BATCH = 40
_WATCHED_BATCH = 8
_GUIDED_BATCH = 20  # pictures, each twice
_SPLITS = ("test", "calibration")


@dataclass(frozen=True)
class _Drawn:
    """Pictures of one seed.

    Attributes:
        tokens: int64 ``[n, L]``, the prompt first.
        passes: of the model over the batch that each was drawn in, ``[n]``.
        prompts: the drawing of the split whose words each was to show, ``[n]``.
        seconds: that drawing took.
        stats: of the last batch's cache, the conditional half's.
        batch: pictures in that batch.
    """

    tokens: Tensor
    passes: NDArray[np.int64]
    prompts: NDArray[np.int64]
    seconds: float
    stats: kvpolicy.CacheStats
    batch: int


class ClipartAR:
    """The model of clip art and the drawings that it was not trained on.

    A seed scores its own drawings (seed 0 the first ``scored`` ones, seed 1 the next, and so on,
    from the first again after the last that ships), and draws pictures of their prompts.

    Args:
        folder: another one than ships, which ``examples/training/pack_clipart_ar.py`` has written.
        scored: drawings that are scored, 2 to 400 (200 of ``calibration``).
        images: pictures that are drawn, at least 1.
        split: drawings that are scored: ``test``, or ``calibration``, which are others.
        line_breaks: whether a line-break token follows each row.
        cfg: guidance of drawing, and of what is scored under guidance; 1 is none.
        batch: pictures that are drawn at once, 1 to 100.
        draw_seed: added to the seed of everything drawn, and of nothing that is scored.

    Raises:
        ParameterError: an argument is out of range, or the folder holds no clipart-ar.
    """

    name = "clipart-ar"
    draws = True

    def __init__(
        self,
        folder: str | None = None,
        scored: int = 100,
        images: int = 20,
        split: str = "test",
        line_breaks: bool = False,
        cfg: float = 3.0,
        batch: int = 20,
        draw_seed: int = 0,
    ) -> None:
        if split not in _SPLITS:
            raise ParameterError(
                f"clipart-ar: split={split!r}; {near_matches(str(split), _SPLITS)}"
            )
        self.zoo = open_clipart(folder)
        self._real_count = len(self.zoo.said(split))
        for name, value, low, high in (
            ("scored", scored, 2, self._real_count),
            ("images", images, 1, 10**6),
            ("batch", batch, 1, 100),
            ("draw_seed", draw_seed, 0, 2**31),
        ):
            if type(value) is not int or not low <= value <= high:
                raise ParameterError(
                    f"clipart-ar: {name}={value!r} must be a whole number from {low} to {high}"
                )
        if type(line_breaks) is not bool:
            raise ParameterError(f"clipart-ar: line_breaks={line_breaks!r} must be true or false")
        if not isinstance(cfg, int | float) or not 1 <= cfg < math.inf:
            raise ParameterError(f"clipart-ar: cfg={cfg!r} must be a number, at least 1")
        self.scored, self.images, self.split = scored, images, split
        self.line_breaks, self.cfg, self.batch = line_breaks, float(cfg), batch
        self.draw_seed = draw_seed
        self.folder = folder
        self.class_names = tuple(words or "(no words)" for words in self.zoo.said(split))
        self.layout = self.zoo.layout(line_breaks=line_breaks)
        self.num_layers = self.zoo.model.config.num_hidden_layers
        self.metrics = (
            Metric(
                name="bits_per_code",
                label="bits per code",
                better="lower",
                array="bits",
                items="real",
                about="of held-out drawings, teacher-forced under the cache",
            ),
            Metric(
                name="guided_bits_per_code",
                label="bits per code under guidance",
                better="lower",
                array="guided_bits",
                items="real",
                about="of held-out drawings, teacher-forced, from the distribution that is drawn "
                "from under guidance",
            ),
            Metric(
                name="divergence",
                label="divergence of what is drawn, bits per code",
                better="lower",
                array="divergence",
                about="of the distribution that is drawn from, under this cache, from the full "
                "cache's: mean of log2 p / q over the codes that were drawn",
            ),
            Metric(
                name="passes",
                label="passes a picture",
                array="passes",
                about="of the model over the batch that a picture was drawn in",
            ),
            Metric(
                name="images_per_second",
                label="pictures per second",
                better="higher",
                timing=True,
                about="drawn",
            ),
        )

    def measure(self, setting: Setting, seed: int, wanted: Collection[str]) -> Measurement:
        """Score this seed's drawings and draw pictures of their prompts."""
        arrays: dict[str, NDArray[Any]] = {}
        figures, images = {}, None
        drawing = {"divergence", "passes", "images_per_second"} & set(wanted)
        first = self._first(seed)
        real = np.arange(first, first + self.scored)
        if "guided_bits_per_code" in wanted:
            score = self._score(setting, self._real(first, self.scored), self.cfg, _ignore)
            arrays |= {"guided_bits": score.bits, "real": real}
            stats, batch = score.stats, 2 * ((self.scored - 1) % _GUIDED_BATCH + 1)
        if "bits_per_code" in wanted or not (drawing or arrays):
            score = self.score(setting, self.scored, _ignore, first=first)
            arrays |= {"bits": score.bits, "real": real}
            stats, batch = score.stats, (self.scored - 1) % _SCORE_BATCH + 1
        if drawing:
            drawn = self._pictures(setting, first, seed)
            arrays |= {"passes": drawn.passes, "classes": drawn.prompts}
            figures["images_per_second"] = len(drawn.tokens) / drawn.seconds
            stats, batch = drawn.stats, drawn.batch
            picture = drawn.tokens[:, self.layout.prefix :]
            images = self.zoo.images(picture, line_breaks=self.line_breaks)
            if "divergence" in wanted:
                arrays["divergence"] = self._divergence(setting, drawn.tokens)
        return Measurement(arrays, stats, batch, figures, images)

    def trace(self, setting: Setting, seed: int) -> bytes:
        """The decisions on this seed's first two drawings, the same for every policy."""
        recording = self.watched(setting, seed, 2, kvpolicy.trace)
        tokens = self._real(self._first(seed), 2)
        pictures = self.zoo.images(tokens[:, self.layout.prefix :], line_breaks=self.line_breaks)
        first = self._first(seed)
        said = self.zoo.said(self.split)[first : first + 2]
        return bytes(recording.finish(torch.as_tensor(np.array(pictures)), said).dump())

    def watched(self, setting: Setting, seed: int, images: int, watch: Watch) -> Any:
        """Score this seed's first drawings while ``watch(cache)`` looks on; what that gave.

        Raises:
            ParameterError: there are not so many drawings.
        """
        first = self._first(seed)
        if not 1 <= images <= self._real_count - first:
            raise ParameterError(
                f"{self.name}: images={images!r} must be a whole number from 1 to "
                f"{self._real_count - first}, which the split {self.split!r} has from seed {seed} "
                f"on"
            )
        with (
            self._attached(setting) as cache,
            watch(cache) as seen,
            torch.inference_mode(),
        ):
            for some in self._real(first, images).split(_WATCHED_BATCH):
                cache.reset()
                self.zoo.model(some, **cache.as_argument)
        return seen

    def calibration(self) -> ClipartAR:
        """The same model on drawings that no test scores."""
        scored = min(self.scored, len(self.zoo.said("calibration")))
        return ClipartAR(
            self.folder,
            scored,
            self.images,
            "calibration",
            self.line_breaks,
            self.cfg,
            self.batch,
            self.draw_seed,
        )

    def estimate(self, setting: Setting) -> float:
        """Seconds that ``measure`` will take, from a few drawings scored and a few lines drawn."""
        begun = time.perf_counter()
        few = min(4, self.scored)
        self.score(setting, few, _ignore)
        # Once as they are, twice under guidance; and of what was drawn, under this cache and full.
        once = (time.perf_counter() - begun) / few
        scoring = once * (3 * self.scored + 4 * self.images)
        batch, tokens = min(self.images, self.batch), 2 * self.layout.line_length
        begun = time.perf_counter()
        self._draw(setting, [row % self._real_count for row in range(batch)], tokens, 0)
        whole = self.layout.rows * self.layout.line_length
        return scoring + (time.perf_counter() - begun) * whole / tokens * self.images / batch

    def score(self, setting: Setting, images: int, advance: Advance, *, first: int = 0) -> Scored:
        """Teacher-force drawings of the split from ``first`` on; ``advance`` counts drawings.

        Line breaks are cached and not scored: where they come is no news.
        """
        return self._score(setting, self._real(first, images), 1.0, advance)

    def _score(self, setting: Setting, tokens: Tensor, cfg: float, advance: Advance) -> Scored:
        """Bits per code of pictures behind their prompts, from what is drawn from at this cfg.

        The unconditional half is a neighbour in the batch: no policy may decide by those.
        """
        prefix, codes = self.layout.prefix, self.zoo.tokens.codes
        nothing = self.zoo.unconditional(line_breaks=self.line_breaks)
        bits = []
        for part in tokens.split(_SCORE_BATCH if cfg == 1 else _GUIDED_BATCH):
            fed = part
            if cfg > 1:
                other = torch.cat([nothing.expand(len(part), -1), part[:, prefix:]], dim=1)
                fed = torch.cat([part, other])
            with self._attached(setting) as cache, torch.inference_mode():
                logits = self.zoo.model(fed[:, :-1], **cache.as_argument).logits
            logits, coming = logits[:, prefix - 1 :].float(), part[:, prefix:]
            is_code = coming != self.zoo.tokens.line_break
            if cfg > 1:  # as drawing does: guided, and then nothing but codes
                said, unsaid = logits[..., :codes].chunk(2)
                logits = guided(said, unsaid, cfg)
            nats = functional.cross_entropy(
                logits.transpose(1, 2), coming * is_code, reduction="none"
            ).double()
            bits.append((nats * is_code).sum(1) / is_code.sum(1) / math.log(2))
            advance(len(part))
        return Scored(torch.cat(bits).numpy(), cache.stats())

    def _divergence(self, setting: Setting, drawn: Tensor) -> NDArray[np.float64]:
        """Of each drawn picture: how much likelier it was under this cache than under a full one.

        The mean over what is drawn estimates the Kullback-Leibler divergence.
        """
        full = Setting(kvpolicy.create("full"), None)
        theirs, own = (self._score(some, drawn, self.cfg, _ignore).bits for some in (full, setting))
        return theirs - own

    def _first(self, seed: int) -> int:
        """The first drawing of a seed."""
        return seed % (self._real_count // self.scored) * self.scored

    def _real(self, first: int, images: int) -> Tensor:
        """Tokens of drawings of the split, the prompt first."""
        tokens_of = {"test": self.zoo.test_tokens, "calibration": self.zoo.calibration_tokens}
        return tokens_of[self.split](first + images, line_breaks=self.line_breaks)[first:]

    def _pictures(self, setting: Setting, first: int, seed: int) -> _Drawn:
        """Draw the prompts of drawings from ``first`` on, seeded batch by batch."""
        drawn, passes, prompts = [], [], []
        begun = time.perf_counter()
        count = self.layout.rows * self.layout.line_length
        for number, start in enumerate(range(0, self.images, self.batch)):
            size = min(self.batch, self.images - start)
            rows = [(first + start + row) % self._real_count for row in range(size)]
            chance = self.draw_seed + 1000 * seed + number
            tokens, took, stats = self._draw(setting, rows, count, chance)
            drawn.append(tokens)
            passes += [took] * size
            prompts += rows
        seconds = time.perf_counter() - begun
        return _Drawn(torch.cat(drawn), np.array(passes), np.array(prompts), seconds, stats, size)

    def _draw(
        self, setting: Setting, rows: Sequence[int], count: int, seed: int
    ) -> tuple[Tensor, int, kvpolicy.CacheStats]:
        """Draw ``count`` tokens behind the prompts of some drawings; and the passes they took."""
        prompt = torch.cat([self._real(row, 1)[:, : self.layout.prefix] for row in rows])
        with ExitStack() as stack:
            cache = stack.enter_context(self._attached(setting))
            guidance: Any = 1.0
            if self.cfg > 1:
                second = stack.enter_context(self._attached(setting))
                nothing = self.zoo.unconditional(line_breaks=self.line_breaks)
                guidance = Guidance(self.cfg, self.zoo.model, second, nothing)
            drawn = decode(
                self.zoo.model,
                prompt,
                cache,
                count,
                decoder=setting.decoder,
                guidance=guidance,
                rules=(self.zoo.grammar(line_breaks=self.line_breaks),),
                seed=seed,
            )
            return drawn.tokens, drawn.passes, cache.stats()

    def _attached(self, setting: Setting) -> Any:
        return attach(
            self.zoo.model, policy=setting.policy, budget=setting.budget, layout=self.layout
        )


def _ignore(count: int) -> None:
    """Progress that nobody watches."""
