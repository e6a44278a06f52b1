"""What a cache costs fashion-lpd, in bits, and what is left: the first table of docs/parallel.md.

Cells are kept in a file, one line each, so that the same command goes on where it was stopped;
those of other weights or settings are measured anew. Where the code has changed, begin a new file.

    python examples/parallel_bits.py --out runs/parallel.jsonl                  # 48 test images
    python examples/parallel_bits.py --out runs/parallel.jsonl --split calibration --rows ahead,near
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
from kvpolicy import Decoder, OrderedLayout, Parallel
from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.search.offsets import measure_offsets
from kvpolicy.lab.search.oracle import GroupOracle
from kvpolicy_adapters import zoo
from kvpolicy_adapters.evaluation.subjects import FashionLPD

#: ``ahead`` with what heads of this model were seen to look at, by offset.
MEASURED = "ahead by offset"
#: Oracles are spelled ``oracle:groups:how``.
BITS = (
    "oracle:8:together",
    "oracle:8:mass",
    MEASURED,
    "ahead",
    "ahead/score=change_ahead:4lines:4.0:together",
    "ahead/score=change_ahead:4lines:4.0:mass",
    "near",
    "streaming_llm",
    "h2o",
    "random",
)
BUDGETS = ("1/4", "1/6", "1/8")
_BATCH = 16


def policy_of(row: str, offsets: Path) -> kvpolicy.EvictionPolicy:
    """The policy of a row; the file of offsets is measured if it is not there."""
    if row != MEASURED:
        return kvpolicy.create(row)
    if not offsets.exists():
        order = Decoder.parse("lpd:passes=48")
        measure_offsets(FashionLPD(), order, offsets, named="fashion-lpd")
    return kvpolicy.create("ahead", offsets=str(offsets))


class Cells:
    """Finished cells, by what they were measured with."""

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


def main(
    out: Annotated[Path, typer.Option(help="File for finished cells.")],
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
    kept = Cells(out, box.card.files["model.safetensors"])

    def score(policy: str, budget: str | None) -> NDArray[np.float64]:
        key = {"policy": policy, "budget": budget, "images": images, "passes": passes}
        found = kept.measured(
            {**key, "split": split},
            lambda: [
                n
                for part in real.split(_BATCH)
                for n in _bits(box, part, policy, budget, layout, out.with_suffix(".offsets.json"))
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
    offsets: Path,
) -> list[float]:
    """Bits per pixel of each image."""
    used: Any
    if policy.startswith("oracle:"):
        _, groups, how = policy.split(":")
        used = GroupOracle.of(box.looks(real, layout), groups=int(groups), how=how)
    else:
        used = policy_of(policy, offsets)
    with box.attached(used, budget, layout) as cache:
        found: list[float] = box.bits(real, cache).tolist()
    return found


if __name__ == "__main__":
    typer.run(main)
