"""The main job as plans: images from a sixth of the cache, what policies cost and decoders save."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpolicy.decoding import Decoder, Parallel
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.compare.comparison import Entry, Estimate
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.plan import BASELINE, SEQUENTIAL, Plan

__all__ = [
    "DECODERS",
    "DRAWN_UNDER",
    "GROUPS_UNDER",
    "POLICIES",
    "SUBJECTS",
    "DecoderRow",
    "Row",
    "Shown",
    "by_line_or_group",
    "decoder_plan",
    "decoder_rows",
    "group_plan",
    "plan",
    "rows",
    "shown",
    "write_rows",
]


@dataclass(frozen=True)
class Shown:
    """What the demo measures of a subject, and on how much of it.

    Attributes:
        main: the metric that is compared with the full cache, in bits.
        drawn: metrics of what is drawn.
        images: pictures that each policy draws.
        scored: real ones that are scored.
    """

    main: str
    drawn: tuple[str, ...]
    images: int
    scored: int


#: What the demo can be of.
SUBJECTS = {
    "fashion-ar": Shown("bits_per_pixel", ("frechet", "class_accuracy"), 200, 256),
    "clipart-ar": Shown("bits_per_code", ("divergence",), 20, 100),
}

#: What the demo compares unless told otherwise.
POLICIES = ("full", "linear", "linear2d", "h2o", "streaming_llm", "pyramid", "random")

#: What draws under :data:`DRAWN_UNDER`, beside the policies.
DECODERS = ("sequential", "sjd:window=32")
DRAWN_UNDER = "linear"
#: What draws in groups does so under the full cache and this: ``linear`` keeps lines.
GROUPS_UNDER = "ahead"
#: How fashion-lpd draws them; see docs/parallel.md.
_GUIDED = {"cfg": 1.5, "temperature": 1.0}
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
        delta_bits: the difference of the main metric to ``full`` on the same images; 0 for ``full``
            itself, None where ``full`` has failed.
        delta_low: lower end of its 95% interval (paired bootstrap over images).
        delta_high: upper end.
        images_per_second: of generation, on one thread, beside the other workers.
        figures: the metrics of :data:`SUBJECTS`, the main one first; in the file they stand beside
            the others.
    """

    policy: str
    budget: str
    peak_tokens: float
    cache_bytes: int
    delta_bits: float | None
    delta_low: float | None
    delta_high: float | None
    images_per_second: float
    figures: Mapping[str, float | None]


def plan(
    policies: Sequence[str],
    budget: str,
    *,
    images: int,
    scored: int,
    seed: int,
    subject: str = "fashion-ar",
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """What ``kvpolicy demo`` runs: every policy at one budget, on the same images, with traces.

    Args:
        policies: names; ``full`` is always there.
        budget: in any spelling.
        images: images to draw with each policy.
        scored: real images to score.
        seed: of the drawing; the real images are the same ones for every seed.
        subject: one of :data:`SUBJECTS`.
        options: of the subject, beside those.

    Raises:
        ParameterError: there is no policy or no such subject, or the budget can't be parsed.
    """
    about = shown(subject)
    metrics = (about.main, *about.drawn, "images_per_second", "peak_tokens", "cache_bytes")
    return Plan(
        subject=subject,
        options=_options(options, seed, images=images, scored=scored),
        policies=list(dict.fromkeys(policies)),
        budgets=[budget],
        metrics=metrics,
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
        times_as_fast: as the subject's full cache in the same run, or fashion-ar's where the rows
            are fashion-lpd's; None where that has failed.
        figures: of what is drawn, as in :class:`Row`; None for a Fréchet distance of fewer than 100
            images.
    """

    drawn_by: str
    budget: str
    passes: float
    seconds: float
    times_as_fast: float | None
    figures: Mapping[str, float | None]


def decoder_plan(
    decoders: Sequence[str],
    budget: str,
    *,
    images: int,
    seed: int,
    subject: str = "fashion-ar",
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """What ``kvpolicy demo`` runs to compare decoders: ``linear`` with each, and the full cache.

    One image at a time: what a decoder saves is passes, and a batch waits for its slowest sequence.

    Args:
        decoders: spelled.
        budget: in any spelling.
        images: images to draw with each.
        seed: of the drawing.
        subject: one of :data:`SUBJECTS`.
        options: of the subject, beside those.

    Raises:
        ParameterError: there is no decoder or no such subject, or one can't be read, or the budget
            can't be parsed.
    """
    return Plan(
        subject=subject,
        options=_options(options, seed, images=images, batch=1),
        policies=[{"name": BASELINE, "decoders": [SEQUENTIAL]}, DRAWN_UNDER],
        budgets=[budget],
        decoders=decoders,
        metrics=_metrics(subject, images),
    )


def group_plan(decoders: Sequence[str], budget: str, *, images: int, seed: int) -> Plan:
    """The same for decoders that draw in groups, which fashion-ar can't: fashion-lpd, guided.

    Args:
        decoders: spelled, ``lpd`` each.
        budget: as of :func:`decoder_plan`.
        images: likewise.
        seed: likewise.

    Raises:
        ParameterError: as of :func:`decoder_plan`.
    """
    return Plan(
        subject="fashion-lpd",
        options={**_GUIDED, **_options(None, seed, images=images, batch=1)},
        policies=[{"name": BASELINE, "decoders": list(decoders)}, GROUPS_UNDER],
        budgets=[budget],
        decoders=decoders,
        metrics=_metrics("fashion-ar", images),
    )


def _metrics(subject: str, images: int) -> list[str]:
    """What is measured where decoders are compared."""
    drawn = [name for name in shown(subject).drawn if name != "frechet" or images >= _FRECHET]
    return ["passes", "images_per_second", *drawn]


def by_line_or_group(decoders: Sequence[str]) -> tuple[list[str], list[str]]:
    """Decoders that draw line by line, and those that need a model of groups.

    Raises:
        UnknownNameError: no decoder has this name.
        ParameterError: there is none, or one can't be read.
    """
    if not decoders:
        raise ParameterError("no decoders: name one at least, sjd:window=32 or lpd:passes=48")
    by_line: list[str] = []
    by_group: list[str] = []
    for decoder in decoders:
        kind = by_group if isinstance(Decoder.parse(decoder), Parallel) else by_line
        kind.append(decoder)
    return by_line, by_group


def decoder_rows(
    entries: Sequence[Entry],
    subject: str = "fashion-ar",
    baseline: Sequence[DecoderRow] | None = None,
) -> list[DecoderRow]:
    """The table of decoders, out of a comparison of cells of one model.

    Args:
        entries: the cells.
        subject: one of :data:`SUBJECTS`, whose metrics they have.
        baseline: rows of another model, with whose full cache these are compared; None for this
            one's.
    """
    figures = [{name: f.estimate.value for name, f in e.findings.items()} for e in entries]
    seconds = [1 / of["images_per_second"] for of in figures]
    if baseline is None:
        full = next((s for e, s in zip(entries, seconds, strict=True) if e.is_full), None)
    else:
        full = next((row.seconds for row in baseline if row.drawn_by == BASELINE), None)
    return [
        DecoderRow(
            drawn_by=entry.label,
            budget=entry.budget or "1/1",
            passes=of["passes"],
            seconds=own,
            times_as_fast=None if full is None else full / own,
            figures={name: of.get(name) for name in shown(subject).drawn},
        )
        for entry, of, own in zip(entries, figures, seconds, strict=True)
    ]


def rows(entries: Sequence[Entry], subject: str = "fashion-ar") -> list[Row]:
    """The table, a row for each entry, out of a comparison of a subject's cells."""
    return [_row(entry, shown(subject)) for entry in entries]


def write_rows(table: Sequence[Row | DecoderRow], path: Path) -> None:
    """Write ``results.json`` or ``decoders.json``, whole or not at all."""
    flat = []
    for row in table:
        fields = asdict(row)
        flat.append(fields | fields.pop("figures"))
    write_whole(path, json.dumps(flat, indent=2) + "\n")


def _row(entry: Entry, about: Shown) -> Row:
    figures = {name: finding.estimate.value for name, finding in entry.findings.items()}
    difference = entry.findings[about.main].difference
    if difference is None:
        difference = Estimate(0.0, 0.0, 0.0) if entry.is_full else None
    return Row(
        policy=entry.label,
        budget=entry.budget or "1/1",
        peak_tokens=figures["peak_tokens"],
        cache_bytes=int(figures["cache_bytes"]),
        delta_bits=None if difference is None else difference.value,
        delta_low=None if difference is None else difference.low,
        delta_high=None if difference is None else difference.high,
        images_per_second=figures["images_per_second"],
        figures={name: figures[name] for name in (about.main, *about.drawn)},
    )


def shown(subject: str) -> Shown:
    """What the demo measures of a subject.

    Raises:
        ParameterError: the demo knows no such subject.
    """
    if subject not in SUBJECTS:
        raise ParameterError(
            f"the demo knows no subject {subject!r}; {near_matches(subject, SUBJECTS)}; "
            f"kvpolicy ablate takes any"
        )
    return SUBJECTS[subject]


def _options(given: Mapping[str, Any] | None, seed: int, **own: int) -> dict[str, Any]:
    """Options of the subject: what the command says in other words, and what a user gives.

    Raises:
        ParameterError: they say the same.
    """
    given = given or {}
    for name in ("images", "scored", "batch", "draw_seed"):
        if name in given:
            raise ParameterError(
                f"option {name}={given[name]!r}: the demo has its own --images, --scored and "
                f"--seed, and draws one picture at a time where it compares decoders"
            )
    return {**given, **own, **({"draw_seed": seed} if seed else {})}
