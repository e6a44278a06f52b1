"""The main job as plans: images from a sixth of the cache, what policies cost and decoders save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvpolicy.lab.compare.comparison import Entry, Estimate
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.plan import BASELINE, SEQUENTIAL, Plan

__all__ = [
    "DECODERS",
    "DRAWN_UNDER",
    "POLICIES",
    "DecoderRow",
    "Row",
    "decoder_plan",
    "decoder_rows",
    "plan",
    "rows",
    "write_rows",
]

#: What the demo compares unless told otherwise.
POLICIES = ("full", "linear", "linear2d", "h2o", "streaming_llm", "pyramid", "random")

#: What draws under :data:`DRAWN_UNDER`, beside the policies.
DECODERS = ("sequential", "sjd:window=32")
DRAWN_UNDER = "linear"
#: A Fréchet distance of fewer images tells nothing.
_FRECHET = 100


@dataclass(frozen=True)
class Row:
    """One policy's figures, as they stand in ``results.json``.

    Attributes:
        policy: registry name, or how it is spelled out of parts.
        budget: as it was asked for; ``1/1`` for the full cache.
        peak_tokens: most tokens a head held at any instant, prefix included, mean over layers.
        cache_bytes: keys and values allocated for one image.
        bits_per_pixel: of real test images, teacher-forced under this cache.
        delta_bits: the difference to ``full`` on the same images; 0 for ``full`` itself, None where
            ``full`` has failed.
        delta_low: lower end of its 95% interval (paired bootstrap over images).
        delta_high: upper end.
        frechet: Fréchet distance between features of generated and of real images.
        class_accuracy: share of generated images in which a classifier sees the class asked for.
        images_per_second: of generation, on one thread, beside the other workers.
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


def plan(policies: Sequence[str], budget: str, *, images: int, scored: int, seed: int) -> Plan:
    """What ``kvpolicy demo`` runs: every policy at one budget, on the same images, with traces.

    Args:
        policies: names; ``full`` is always there.
        budget: in any spelling.
        images: images to draw with each policy.
        scored: real images to score.
        seed: of the drawing; the real images are the same ones for every seed.

    Raises:
        ParameterError: there is no policy, or the budget can't be parsed.
    """
    return Plan(
        subject="fashion-ar",
        options={"images": images, "scored": scored, **({"draw_seed": seed} if seed else {})},
        policies=list(dict.fromkeys(policies)),
        budgets=[budget],
        trace=True,
    )


@dataclass(frozen=True)
class DecoderRow:
    """One decoder's figures, as they stand in ``decoders.json``.

    Attributes:
        drawn_by: policy and decoder, as an ablation spells them; ``full`` is the full cache, token
            by token.
        budget: as it was asked for; ``1/1`` for the full cache.
        passes: of the model an image, mean.
        seconds: an image, on one thread, beside the other workers.
        times_as_fast: as the full cache in the same run; None where that has failed.
        class_accuracy: share of images in which a classifier sees the class asked for.
        frechet: distance of the drawn images' features to real ones; None of fewer than 100 images.
    """

    drawn_by: str
    budget: str
    passes: float
    seconds: float
    times_as_fast: float | None
    class_accuracy: float
    frechet: float | None


def decoder_plan(decoders: Sequence[str], budget: str, *, images: int, seed: int) -> Plan:
    """What ``kvpolicy demo`` runs to compare decoders: ``linear`` with each, and the full cache.

    One image at a time: what a decoder saves is passes, and a batch waits for its slowest sequence.

    Args:
        decoders: spelled.
        budget: in any spelling.
        images: images to draw with each.
        seed: of the drawing.

    Raises:
        ParameterError: there is no decoder, or one can't be read, or the budget can't be parsed.
    """
    metrics = ["passes", "images_per_second", "class_accuracy"]
    return Plan(
        subject="fashion-ar",
        options={"images": images, "batch": 1, **({"draw_seed": seed} if seed else {})},
        policies=[{"name": BASELINE, "decoders": [SEQUENTIAL]}, DRAWN_UNDER],
        budgets=[budget],
        decoders=decoders,
        metrics=[*metrics, "frechet"] if images >= _FRECHET else metrics,
    )


def decoder_rows(entries: Sequence[Entry]) -> list[DecoderRow]:
    """The table of decoders, out of a comparison of fashion-ar's cells."""
    figures = [{name: f.estimate.value for name, f in e.findings.items()} for e in entries]
    seconds = [1 / of["images_per_second"] for of in figures]
    full = next((s for e, s in zip(entries, seconds, strict=True) if e.is_full), None)
    return [
        DecoderRow(
            drawn_by=entry.label,
            budget=entry.budget or "1/1",
            passes=of["passes"],
            seconds=own,
            times_as_fast=None if full is None else full / own,
            class_accuracy=of["class_accuracy"],
            frechet=of.get("frechet"),
        )
        for entry, of, own in zip(entries, figures, seconds, strict=True)
    ]


def rows(entries: Sequence[Entry]) -> list[Row]:
    """The table, a row for each entry, out of a comparison of fashion-ar's cells."""
    return [_row(entry) for entry in entries]


def write_rows(table: Sequence[Row | DecoderRow], path: Path) -> None:
    """Write ``results.json`` or ``decoders.json``, whole or not at all."""
    write_whole(path, json.dumps([asdict(row) for row in table], indent=2) + "\n")


def _row(entry: Entry) -> Row:
    figures = {name: finding.estimate.value for name, finding in entry.findings.items()}
    difference = entry.findings["bits_per_pixel"].difference
    if difference is None:
        difference = Estimate(0.0, 0.0, 0.0) if entry.is_full else None
    return Row(
        policy=entry.label,
        budget=entry.budget or "1/1",
        peak_tokens=figures["peak_tokens"],
        cache_bytes=int(figures["cache_bytes"]),
        bits_per_pixel=figures["bits_per_pixel"],
        delta_bits=None if difference is None else difference.value,
        delta_low=None if difference is None else difference.low,
        delta_high=None if difference is None else difference.high,
        frechet=figures["frechet"],
        class_accuracy=figures["class_accuracy"],
        images_per_second=figures["images_per_second"],
    )
