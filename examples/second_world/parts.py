"""What is measured: parts in order of worth, each a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.lab.run.plan import BASELINE, SEQUENTIAL, Plan

__all__ = ["BUDGETS", "WORLDS", "Part", "parts"]

BUDGETS = ("1/4", "1/6", "1/8")
SIXTH, TIGHT = ("1/6",), ("1/6", "1/8")
#: The paper's table, and what a comparison is not complete without.
ORDERED = ("linear", "linear2d", "rkv", "h2o", "streaming_llm", "random")
REST = ("pyramid", "snapkv", "tova", "knorm", "ssd")
#: Parts in which policies are ordered, and how tables call them.
WORLDS = {
    "clipart": "clipart-ar",
    "clipart-guided": "clipart-ar, guidance 3",
    "clipart-breaks": "clipart-ar, line breaks",
    "fashion": "fashion-ar",
    "text": "text",
}
HALVES = (
    "linear",
    "linear2d",
    "second_world.halves:LinearOfConditional",
    "second_world.halves:LinearOfBoth",
    "second_world.halves:Linear2DOfConditional",
)
#: No raster order there, which linear asks for.
TEXT = ("random", "h2o", "streaming_llm", "snapkv", "tova", "knorm", "rkv")
DECODERS = (
    "sjd:window=32",
    "sjd:window=16",
    "sjd:window=64",
    "sjd:window=8",
    "sjd:window=32:draft=left",
    "sjd:window=32:draft=last",
    "sjd:window=32:draft=uniform",
    "sjd:window=32:coupled=false",
    "sjd:window=32:draft=last:coupled=false",
)


@dataclass(frozen=True)
class Part:
    """One run.

    Attributes:
        name: of its folder.
        about: what it answers.
        metric: of its table.
        plan: what is measured.
    """

    name: str
    about: str
    metric: str
    plan: Plan


def parts(drawings: int, pictures: int, clipart: dict[str, Any]) -> list[Part]:
    """All parts, in order of worth.

    Args:
        drawings: real ones that are scored, of each world.
        pictures: that are drawn, of each decoder.
        clipart: options of the subject clipart-ar, such as its folder.
    """

    scored = {"scored": drawings}
    tuned = {"scored": min(drawings, 200), "split": "calibration"}
    few = {"images": pictures, "batch": 1}
    fashion, text = "fashion-ar", "text_subject.subject:Alice"
    bits, guided, pixels = "bits_per_code", "guided_bits_per_code", "bits_per_pixel"

    def part(
        name: str,
        about: str,
        metric: str,
        policies: Sequence[Any] = ORDERED,
        *,
        subject: str = "clipart-ar",
        budgets: Sequence[str] = BUDGETS,
        decoders: Sequence[str] = (SEQUENTIAL,),
        **options: Any,
    ) -> Part:
        plan = Plan(
            subject=subject,
            options={**(clipart if subject == "clipart-ar" else {}), **options},
            policies=policies,
            budgets=budgets,
            decoders=decoders,
            metrics=(metric,),
        )
        return Part(name, about, metric, plan)

    def knobs(name: str, about: str, metric: str, subject: str, line: int) -> Part:
        policies = what_linear2d_could_be(line)
        return part(name, about, metric, policies, subject=subject, budgets=TIGHT, **tuned)

    def passes(name: str, about: str, cfg: float) -> Part:
        drawn = ({"name": BASELINE, "decoders": [SEQUENTIAL]}, "linear")
        return part(name, about, "passes", drawn, budgets=SIXTH, decoders=DECODERS, cfg=cfg, **few)

    return [
        part("clipart", "The ordering", bits, **scored),
        part("fashion", "The ordering on fashion-ar", pixels, subject=fashion, **scored),
        knobs("knobs-clipart", "What linear2d could be", bits, "clipart-ar", 24),
        knobs("knobs-fashion", "What linear2d could be, on fashion-ar", pixels, fashion, 28),
        part("clipart-guided", "The ordering under guidance 3", guided, **scored),
        part("halves", "Halves that share", guided, HALVES, budgets=SIXTH, **scored),
        passes("passes-guided", "Speculative decoding under guidance 3", 3.0),
        passes("passes", "Speculative decoding without guidance", 1.0),
        part("clipart-breaks", "The ordering with line breaks", bits, line_breaks=True, **scored),
        part("text", "The ordering on text", "bits_per_byte", TEXT, subject=text, pieces=64),
        part("clipart-rest", "The other policies", bits, REST, **scored),
        part("fashion-rest", "The others on fashion-ar", pixels, REST, subject=fashion, **scored),
    ]


def what_linear2d_could_be(line: int) -> tuple[str, ...]:
    """``linear``, ``linear2d``, and changes of it, spelled for lines of so many tokens."""
    return (
        "linear",
        "linear/score=least_change:5",
        "linear2d",
        "linear2d/parts=3",
        "linear2d/parts=12",
        "linear2d/lines=8",
        "linear2d/score=least_change:4:alone",
        "linear2d/observe=line_mass",
        f"linear2d/observe=fading_mass:{line}",
        f"linear2d/anchors={line // 4}",
        f"linear2d/recent={line * 3 // 4}",
    )
