"""What is drawn in groups, next to pixel by pixel: the table of all ways in docs/parallel.md.

A row at a time, each written to a file when it is finished, so that the same command goes on where
it was stopped. A row of 1,000 images takes four to five minutes of one core.

    python examples/parallel_table.py --out runs/parallel-table.jsonl                 # all rows
    python examples/parallel_table.py --out runs/parallel-table.jsonl --images 200 --only full

There is no clairvoyant row: what will be looked at is known of an image that exists already, and an
image that is drawn is not known before. ``examples/parallel_bits.py`` has it, for real images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from parallel_bits import MEASURED, Cells, policy_of

from kvpolicy import Decoder
from kvpolicy.lab.compare.bootstrap import interval, replicates
from kvpolicy.lab.compare.frechet import FrechetTo
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters import zoo
from kvpolicy_adapters.evaluation.subjects import FashionAR, FashionLPD

#: How fashion-lpd is guided; fashion-ar is drawn from as it is.
GUIDED = {"cfg": 1.5, "temperature": 1.0}
_BATCH = 50


@dataclass(frozen=True)
class Row:
    """A way to draw: model, decoder, policy and budget."""

    model: str
    decoder: str
    policy: str
    budget: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.decoder}, {self.policy} {self.budget or ''}".strip()


ROWS = (
    Row("fashion-ar", "sequential", "full"),
    Row("fashion-ar", "sequential", "linear", "1/6"),
    Row("fashion-ar", "sequential", "linear2d", "1/6"),
    Row("fashion-ar", "sjd:window=32", "full"),
    Row("fashion-ar", "sjd:window=32", "linear", "1/6"),
    *(Row("fashion-lpd", f"lpd:passes={passes}", "full") for passes in (128, 64, 48, 32)),
    *(
        Row("fashion-lpd", "lpd:passes=48", policy, budget)
        for policy in ("ahead", MEASURED, "near", "h2o", "random")
        for budget in ("1/4", "1/6", "1/8")
    ),
)


def main(
    out: Annotated[Path, typer.Option(help="File for finished rows.")],
    images: Annotated[int, typer.Option(min=10, help="Images a row.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 2000,
    only: Annotated[str, typer.Option(help="Only rows with this in their name.")] = "",
) -> None:
    """Draw each row's images, and print the table."""
    wanted = [row for row in ROWS if only in row.name]
    if not wanted:
        raise typer.BadParameter(f"no row has {only!r} in its name: {[r.name for r in ROWS]}")
    subjects = {
        "fashion-ar": FashionAR(images=images, batch=_BATCH),
        "fashion-lpd": FashionLPD(images=images, batch=_BATCH, **GUIDED),
    }
    weights = {name: zoo.load(name).card.files["model.safetensors"] for name in subjects}
    kept = {name: Cells(out, weights[name]) for name in subjects}
    typer.echo(
        "| drawn by | policy | passes | peak | Fréchet distance | class right | processor s |\n"
        "| --- | --- | --: | --: | --- | --: | --: |"
    )
    for row in wanted:
        key = {"row": row.name, "images": images, "seed": seed}
        if row.model == "fashion-lpd":
            key |= GUIDED
        found = kept[row.model].measured(
            key,
            partial(
                _draw, subjects[row.model], row, images, seed, out.with_suffix(".offsets.json")
            ),
        )
        value, low, high = found["frechet"]
        typer.echo(
            f"| {row.model}, `{row.decoder}` | `{row.policy}` {row.budget or ''} "
            f"| {found['passes']:.0f} | {found['peak']} | {value:.2f} ({low:.2f} to {high:.2f}) "
            f"| {found['class_right']:.1%} | {found['seconds']:.2f} |"
        )


def _draw(subject: Any, row: Row, images: int, seed: int, offsets: Path) -> dict[str, Any]:
    """A row's figures."""
    policy = policy_of(row.policy, offsets)
    setting = Setting(policy, row.budget, Decoder.parse(row.decoder))
    begun = time.process_time()
    drawn = subject.generate(setting, images, seed, lambda count: None)
    seconds = (time.process_time() - begun) / images
    frechet = FrechetTo(*subject.reference())
    features = drawn.features
    return {
        "frechet": [frechet(features), *interval(frechet(features), replicates(features, frechet))],
        "class_right": float(drawn.correct.mean()),
        "passes": float(drawn.passes.mean()),
        "peak": max(drawn.stats.peak_tokens),
        "seconds": seconds,
    }


if __name__ == "__main__":
    typer.run(main)
