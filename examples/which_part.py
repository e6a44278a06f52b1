"""Which of LineAR's parts does the work? One part changed at a time, on real images.

Each row is ``linear`` with one choice changed through ``kvpolicy.compose``. All rows score the same
real images of fashion-ar, which is in the box, so differences are paired:

    python examples/which_part.py                    # 256 images, 1/6 of the cache: 5 minutes
    python examples/which_part.py --images 16        # a first look
    python examples/which_part.py --markdown         # the table of docs/compose.md

A schedule shares out what lies above the smallest budget that the policy works with.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvpolicy
from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.run.subject import Setting, load_subject

#: What is changed, and how a command line would spell it.
ROWS = {
    "nothing: `linear` as it is": "linear",
    "protect: no anchors": "linear/protect=lines:1",
    "protect: no finished line": "linear/protect=anchors:28+lines:0",
    "protect: two finished lines": "linear/protect=anchors:28+lines:2",
    "observe: mass of all queries": "linear/observe=cumulative_mass",
    "observe: mass that fades, half-life 28": "linear/observe=fading_mass:28",
    "observe: the last query": "linear/observe=last_query",
    "score: mean over heads": "linear/score=head_mean",
    "score: the least change of what is read, as in `linear2d`": "linear/score=least_change:5",
    "score: nothing but recency": "linear/observe=none/score=recency",
    "score: lots": "linear/observe=none/score=lots:0",
    "decide: every token": "linear/decide=token",
    "decide: every 7 tokens": "linear/decide=every:7",
    "schedule: less in upper layers": "linear/schedule=arithmetic:20",
    "schedule: the second layer's share doubled": "linear/schedule=per_layer:1:2:1:1",
}


class Effect(NamedTuple):
    """What a change costs, in bits per pixel, with the ends of its 95% interval."""

    change: str
    spelled: str
    over_full: float
    over_linear: tuple[float, float, float]


def measure(rows: dict[str, str], budget: str, images: int) -> list[Effect]:
    """Score the images under each row's policy."""
    subject = load_subject("fashion-ar")
    full = subject.score(Setting(kvpolicy.create("full"), None), images, lambda count: None).bits
    bits = {}
    for change, spelled in track(rows.items(), "scoring", console=Console(stderr=True)):
        setting = Setting(kvpolicy.create(spelled), budget)
        bits[change] = subject.score(setting, images, lambda count: None).bits
    base = bits[next(iter(rows))]
    return [
        Effect(change, rows[change], float((own - full).mean()), paired_bootstrap(own - base))
        for change, own in bits.items()
    ]


def main(
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    images: Annotated[int, typer.Option(min=2, max=1000, help="Real images to score.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Only the first so many rows.")] = len(ROWS),
    markdown: Annotated[bool, typer.Option(help="Print a table for a page.")] = False,
) -> None:
    """Print what each change costs."""
    effects = measure(dict(list(ROWS.items())[:rows]), budget, images)
    headings = ("changed", "spelled", "over the full cache", "over `linear`")
    cells = [
        (
            effect.change,
            f"`{effect.spelled}`",
            f"{effect.over_full:+.4f}",
            "" if not number else "{:+.4f} ({:+.4f} to {:+.4f})".format(*effect.over_linear),
        )
        for number, effect in enumerate(effects)
    ]
    if markdown:
        for row in (headings, ("---", "---", "--:", "--:"), *cells):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(*headings, title=f"bits per pixel, {images} images, {budget} of the cache")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
