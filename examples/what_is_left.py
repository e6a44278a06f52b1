"""What is left to gain over ``linear``: other estimates, other layers, and oracles as the limit.

Every row scores the same real images of fashion-ar, none of them a test image, so differences are
paired:

    python examples/what_is_left.py                 # 64 images, 1/6 of the cache: two minutes
    python examples/what_is_left.py --images 256    # all that ship for this
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

import kvpolicy
from kvpolicy.lab.metrics import paired_bootstrap
from kvpolicy.lab.oracle import oracle_bits
from kvpolicy.lab.subject import Setting, load_subject

LAYERS = "schedule=per_layer:0:66:66:52"
#: Policies as they are spelled; ``next`` and ``all`` are the oracles.
ROWS = (
    "linear",
    "linear/protect=anchors:14+lines:1",
    "linear/observe=fading_mass:56",
    "linear/score=pooled:3:1:mean",
    "linear2d/score=moving_mass:0.25",
    "linear2d",
    "linear2d/score=moving_mass:1",
    f"linear/{LAYERS}",
    f"linear2d/{LAYERS}",
    "next",
    "all",
)


def main(
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    images: Annotated[int, typer.Option(min=2, max=256, help="Real images to score.")] = 64,
) -> None:
    """Print a table for a page."""
    subject = load_subject("fashion-ar", {"split": "calibration"})

    def score(name: str, budget: str | None = budget) -> NDArray[np.float64]:
        horizons: dict[str, Literal["next", "all"]] = {"next": "next", "all": "all"}
        if name in horizons:
            return oracle_bits(subject, budget or "", images, horizons[name])
        setting = Setting(kvpolicy.create(name), budget)
        bits: NDArray[np.float64] = subject.score(setting, images, lambda count: None).bits
        return bits

    full = score("full", None)
    bits = {name: score(name) for name in track(ROWS, "scoring", console=Console(stderr=True))}
    print("| policy | over the full cache | over `linear` |\n| --- | --: | --: |")
    for name, own in bits.items():
        over = "{:+.4f} ({:+.4f} to {:+.4f})".format(*paired_bootstrap(own - bits["linear"]))
        shown = f"oracle, {name}" if name in ("next", "all") else f"`{name}`"
        print(f"| {shown} | {float((own - full).mean()):+.4f} | {over * (name != 'linear')} |")


if __name__ == "__main__":
    typer.run(main)
