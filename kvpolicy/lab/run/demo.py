"""The main job as a plan: images from a sixth of the cache, and what each policy costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvpolicy.lab.compare.comparison import Entry, Estimate
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.plan import Plan

__all__ = ["POLICIES", "Row", "plan", "rows", "write_rows"]

#: What the demo compares unless told otherwise.
POLICIES = ("full", "linear", "linear2d", "h2o", "streaming_llm", "pyramid", "random")


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


def rows(entries: Sequence[Entry]) -> list[Row]:
    """The table, a row for each entry, out of a comparison of fashion-ar's cells."""
    return [_row(entry) for entry in entries]


def write_rows(table: Sequence[Row], path: Path) -> None:
    """Write ``results.json``, whole or not at all."""
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
