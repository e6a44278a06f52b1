"""What a cache costs fashion-lpd, in bits and in images: the tables of docs/parallel.md.

Rows are kept in a file, one line each, so that the same command goes on where it was stopped; rows
of other weights or other settings are measured anew.

    python examples/parallel_table.py bits --out runs/parallel                  # 48 test images
    python examples/parallel_table.py draw --out runs/parallel --images 200
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

import kvpolicy
from kvpolicy import OrderedLayout, Parallel
from kvpolicy.lab.compare.bootstrap import interval, paired_bootstrap, replicates
from kvpolicy.lab.compare.frechet import FrechetTo
from kvpolicy.lab.search.oracle import GroupOracle
from kvpolicy_adapters import zoo

#: Oracles are spelled ``oracle:groups:how``.
BITS = (
    "oracle:8:together",
    "oracle:8:mass",
    "ahead",
    "ahead/score=change_ahead:4lines:4.0:together",
    "ahead/score=change_ahead:4lines:4.0:mass",
    "near",
    "streaming_llm",
    "h2o",
    "random",
)
BUDGETS = ("1/4", "1/6", "1/8")
#: Passes, policy, budget.
DRAWN = (
    *((passes, "full", None) for passes in (48, 128, 64, 32)),
    *((48, policy, "1/4") for policy in ("ahead", "near", "h2o", "random")),
    *((48, policy, "1/8") for policy in ("ahead", "near", "h2o")),
    *((48, policy, "1/6") for policy in ("ahead", "near", "h2o")),
)
_BATCH = 16

app = typer.Typer(add_completion=False, help=__doc__)
Out = Annotated[Path, typer.Option(help="Folder for rows.")]


class Rows:
    """Finished rows of one kind, by what they were measured with."""

    def __init__(self, path: Path, weights: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._weights = path, weights
        lines = path.read_text().splitlines() if path.exists() else []
        self._found = {key: values for key, values in map(json.loads, lines)}

    def measured(self, key: dict[str, Any], measure: Any) -> Any:
        """What has been measured with these settings, or is now."""
        name = json.dumps({**key, "weights": self._weights}, sort_keys=True)
        if name not in self._found:
            begun = time.process_time()
            self._found[name] = measure()
            with self._path.open("a") as file:
                file.write(json.dumps([name, self._found[name]]) + "\n")
            typer.echo(f"{key}: {time.process_time() - begun:.0f} s of a processor", err=True)
        return self._found[name]


@app.command()
def bits(
    out: Out,
    images: Annotated[int, typer.Option(min=2, max=1000, help="Images that are scored.")] = 48,
    passes: int = 48,
    split: Annotated[str, typer.Option(help="test, or calibration.")] = "test",
    rows: Annotated[str, typer.Option(help="Only these policies, by commas.")] = "",
    budgets: Annotated[str, typer.Option(help="Only these, by commas.")] = "",
) -> None:
    """Bits per pixel of real images, teacher-forced, over the full cache's."""
    box = zoo.load("fashion-lpd")
    layout = Parallel(passes=passes).ordered(box.grid)
    tokens = {"test": box.fashion.test_tokens, "calibration": box.fashion.calibration_tokens}[split]
    real = tokens(images)
    kept = Rows(out / "bits.jsonl", box.card.files["model.safetensors"])

    def score(policy: str, budget: str | None) -> NDArray[np.float64]:
        key = {"policy": policy, "budget": budget, "images": images, "passes": passes}
        found = kept.measured(
            {**key, "split": split},
            lambda: [
                n for part in real.split(_BATCH) for n in _bits(box, part, policy, budget, layout)
            ],
        )
        return np.array(found)

    full = score("full", None)
    wanted = budgets.split(",") if budgets else BUDGETS
    typer.echo(f"full: {full.mean():.4f}\n\n| policy | {' | '.join(wanted)} |")
    typer.echo("| --- |" + " --: |" * len(wanted))
    for policy in rows.split(",") if rows else BITS:
        cells = []
        for budget in wanted:
            more, low, high = paired_bootstrap(score(policy, budget) - full)
            cells.append(f"{more:+.4f} ({low:+.4f} to {high:+.4f})")
        typer.echo(f"| `{policy}` | {' | '.join(cells)} |")


def _bits(
    box: zoo.FashionLPD,
    real: torch.Tensor,
    policy: str,
    budget: str | None,
    layout: OrderedLayout,
) -> list[float]:
    """Bits per pixel of each image."""
    used: Any
    if policy.startswith("oracle:"):
        _, groups, how = policy.split(":")
        used = GroupOracle.of(box.looks(real, layout), groups=int(groups), how=how)
    else:
        used = kvpolicy.create(policy)
    with box.attached(used, budget, layout) as cache:
        found: list[float] = box.bits(real, cache).tolist()
    return found


@app.command()
def draw(
    out: Out,
    images: Annotated[int, typer.Option(min=10, help="Images of each row, classes in turn.")] = 200,
    guidance: float = 2.0,
    batch: int = 50,
    seed: int = 1000,
    rows: Annotated[str, typer.Option(help="Only these, as 48:ahead:1/4, by commas.")] = "",
) -> None:
    """Fréchet distance and class accuracy of images that are drawn."""
    box = zoo.load("fashion-lpd")
    kept = Rows(out / "draw.jsonl", box.card.files["model.safetensors"])
    distance = FrechetTo(*box.fashion.reference)
    chosen = [row.split(":") for row in rows.split(",")] if rows else DRAWN
    typer.echo("| passes | policy | Fréchet distance | class right | s an image | peak tokens |")
    typer.echo("| --: | --- | --: | --: | --: | --: |")
    for passes, policy, budget in chosen:
        setting = {"passes": int(passes), "policy": policy, "budget": budget or None}
        key = {**setting, "guidance": guidance, "batch": batch, "images": images, "seed": seed}
        row = kept.measured(key, lambda key=key: _drawn(box, **key))
        pixels = torch.tensor(row["pixels"], dtype=torch.uint8).long()
        features = box.fashion.features(pixels).double().numpy()
        right = (box.fashion.classify(pixels) == torch.arange(images) % 10).double()
        value = distance(features)
        low, high = interval(value, replicates(features, distance))
        typer.echo(
            f"| {passes} | `{policy}` {budget or ''} | {value:.2f} ({low:.2f} to {high:.2f}) | "
            f"{float(right.mean()):.1%} | {row['seconds'] / images:.3f} | {row['peak']} |"
        )


def _drawn(box: zoo.FashionLPD, **key: Any) -> dict[str, Any]:
    """Pixels of each image, seconds of processor time, and the most tokens of a sequence."""
    decoder = Parallel(passes=key["passes"])
    layout = decoder.ordered(box.grid)
    pixels: list[list[int]] = []
    begun, peak = time.process_time(), 0
    for number, classes in enumerate((torch.arange(key["images"]) % 10).split(key["batch"])):
        with box.attached(key["policy"], key["budget"], layout) as cache:
            drawn = box.draw(
                classes, cache, decoder, guidance=key["guidance"], seed=key["seed"] + number
            )
            peak = max(cache.stats().peak_tokens)
        pixels += drawn.tolist()
    return {"pixels": pixels, "seconds": time.process_time() - begun, "peak": peak}


if __name__ == "__main__":
    app()
