"""Which part of ``linear2d`` does the work? And what is left: oracles, which see coming lines.

Every row scores the same real images of fashion-ar, so differences are paired:

    python examples/what_is_left.py                                  # 64 images: three minutes
    python examples/what_is_left.py --images 256                     # all that ship for calibration
    python examples/what_is_left.py --split test --images 1000 --budget 1/4
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

import kvpolicy
from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.run.subject import Setting, load_subject
from kvpolicy.lab.search.oracle import oracle_bits

LAYERS = "schedule=per_layer:0:66:66:52"
#: Policies as they are spelled; ``next`` and ``all`` are the oracles.
ROWS = (
    "linear",
    "linear/score=moving_mass:0.5",
    "linear/score=least_change:0:alone",
    "linear/score=least_change:5:alone",
    "linear/score=least_change:0",
    "linear/score=least_change:1",
    "linear/score=least_change:5",
    "linear/score=least_change:10",
    "linear2d",
    "linear2d/lines=8",
    "linear2d/parts=2",
    "linear2d/parts=12",
    "linear2d/observe=line_mass",
    "linear2d/observe=fading_mass:56",
    "linear2d/anchors=14",
    "linear2d/anchors=42",
    f"linear/{LAYERS}",
    f"linear2d/{LAYERS}",
    "next",
    "all",
)


def main(
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    images: Annotated[int, typer.Option(min=2, max=1000, help="Real images to score.")] = 64,
    split: Annotated[str, typer.Option(help="calibration (256 images), or test.")] = "calibration",
    rows: Annotated[str, typer.Option(help="Only these beside linear, by commas.")] = "",
) -> None:
    """Print a table for a page."""
    subject = load_subject("fashion-ar", {"split": split})

    def score(name: str, budget: str | None = budget) -> NDArray[np.float64]:
        horizons: dict[str, Literal["next", "all"]] = {"next": "next", "all": "all"}
        if name in horizons:
            return oracle_bits(subject, budget or "", images, horizons[name])
        setting = Setting(kvpolicy.create(name), budget)
        bits: NDArray[np.float64] = subject.score(setting, images, lambda count: None).bits
        return bits

    full = score("full", None)
    names = ["linear", *filter(None, rows.split(","))] if rows else ROWS
    bits = {name: score(name) for name in track(names, "scoring", console=Console(stderr=True))}
    print("| policy | over the full cache | over `linear` | fewer extra bits |")
    print("| --- | --: | --: | --: |")
    linear = bits["linear"]
    extra = float((linear - full).mean())
    for name, own in bits.items():
        shown = f"oracle, {name}" if name in ("next", "all") else f"`{name}`"
        more, low, high = paired_bootstrap(own - full)
        cells = [f"{more:+.4f} ({low:+.4f} to {high:+.4f})", "", ""]
        if name != "linear":
            more, low, high = paired_bootstrap(own - linear)
            cells[1] = f"{more:+.4f} ({low:+.4f} to {high:+.4f})"
            cells[2] = f"{-more / extra:.1%} ({-high / extra:.1%} to {-low / extra:.1%})"
        print(f"| {shown} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
