"""The main job: images from a sixth of the cache, and what each policy costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpolicy.cache.cache import CacheStats, PolicyCache
from kvpolicy.lab.compare.metrics import frechet_distance, paired_bootstrap
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.subject import Advance, Generated, ImageSubject, Setting
from kvpolicy.registry import create

__all__ = ["POLICIES", "Result", "Row", "plan", "run", "write_rows"]

#: What the demo compares unless told otherwise.
POLICIES = ("full", "linear", "h2o", "streaming_llm", "pyramid", "random")


@dataclass(frozen=True)
class Row:
    """One policy's figures, as they stand in ``results.json``.

    Attributes:
        policy: registry name, or how it is spelled out of parts.
        budget: as it was asked for; ``1/1`` for the full cache.
        peak_tokens: most tokens a head held at any instant, prefix included, mean over layers.
        cache_bytes: keys and values allocated for one image.
        bits_per_pixel: of real test images, teacher-forced under this cache.
        delta_bits: the difference to ``full`` on the same images; 0 for ``full`` itself.
        delta_low: lower end of its 95% interval (paired bootstrap over images).
        delta_high: upper end.
        frechet: Fréchet distance between features of generated and of real images.
        class_accuracy: share of generated images in which a classifier sees the class asked for.
        images_per_second: of generation.
    """

    policy: str
    budget: str
    peak_tokens: float
    cache_bytes: int
    bits_per_pixel: float
    delta_bits: float | None
    delta_low: float | None
    delta_high: float | None
    frechet: float
    class_accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class Result:
    """A row, and what the pictures need.

    Attributes:
        row: the figures.
        bits: bits per pixel of each image.
        generated: the images drawn.
        retention: share of heads that hold each token, ``[moments, layers, rows, cols]``.
        peaks: peak tokens of each layer.
    """

    row: Row
    bits: NDArray[np.float64]
    generated: Generated
    retention: NDArray[np.float64]
    peaks: tuple[int, ...]


def plan(policies: Sequence[str], budget: str, subject: ImageSubject) -> list[Setting]:
    """Parse and check everything before the first forward pass.

    The first setting is always ``full``, with which the others are compared.

    Raises:
        UnknownNameError, ParameterError, BudgetError: a policy or the budget is wrong.
    """
    names = ["full", *(name for name in dict.fromkeys(policies) if name != "full")]
    settings = [Setting(create(name), None if name == "full" else budget) for name in names]
    for setting in settings:
        PolicyCache(
            setting.policy, setting.budget, layout=subject.layout, num_layers=subject.num_layers
        )
    return settings


def run(
    setting: Setting,
    subject: ImageSubject,
    *,
    images: int,
    scored: int,
    seed: int,
    moments: tuple[int, ...],
    full: Result | None,
    on_score: Advance,
    on_generate: Advance,
) -> Result:
    """Try one setting: score real images, draw new ones, and look at what is kept.

    Args:
        setting: policy and budget.
        subject: what it is tried on.
        images: images to draw.
        scored: real images to score.
        seed: seed of the drawing; the same for every policy.
        moments: numbers of image tokens after which to look.
        full: the full cache's result to compare with; None while it is being made.
        on_score: progress over images.
        on_generate: progress over tokens.
    """
    score = subject.score(setting, scored, on_score)
    drawn = subject.generate(setting, images, seed, on_generate)
    _, retention = subject.retention(setting, moments)
    low: float | None
    high: float | None
    delta: float | None
    if full is None:
        delta = low = high = 0.0
    else:
        delta, low, high = paired_bootstrap(score.bits - full.bits)
    mean, covariance = subject.reference()
    own = drawn.features
    enough = len(own) > 1
    row = Row(
        policy=setting.policy.label,
        budget=setting.budget or "1/1",
        peak_tokens=_mean(drawn.stats),
        cache_bytes=drawn.stats.bytes // drawn.batch,
        bits_per_pixel=float(score.bits.mean()),
        delta_bits=delta,
        delta_low=low,
        delta_high=high,
        frechet=frechet_distance(own.mean(0), np.cov(own, rowvar=False), mean, covariance)
        if enough
        else float("nan"),
        class_accuracy=float(drawn.correct.mean()),
        images_per_second=len(drawn.images) / drawn.seconds,
    )
    return Result(row, score.bits, drawn, retention, drawn.stats.peak_tokens)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write ``results.json``, whole or not at all."""
    write_whole(path, json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _mean(stats: CacheStats) -> float:
    mean = sum(stats.peak_tokens) / len(stats.peak_tokens)
    return int(mean) if mean == int(mean) else mean
