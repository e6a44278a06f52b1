"""Images per second of all ways to draw, by batch size: the last table in docs/parallel.md.

Contenders take turns, so that what else the machine does hits all of them alike; each is timed once
a round, and the fastest round counts. Twenty-four rows take five minutes a round of one core, with
nothing else at work. Finished timings are kept, and the same command goes on.

    python examples/parallel_speed.py --out runs/parallel-speed.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from parallel_bits import Cells, policy_of
from parallel_table import GUIDED, ROWS

from kvpolicy import Decoder
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters import zoo
from kvpolicy_adapters.evaluation.subjects import FashionAR, FashionLPD


def main(
    out: Annotated[Path, typer.Option(help="File for finished timings.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 2,
    batches: Annotated[str, typer.Option(help="Images at once, by commas.")] = "1,8,32",
    only: Annotated[str, typer.Option(help="Only rows with this in their name.")] = "",
) -> None:
    """Time each row, and print images per second."""
    torch.set_num_threads(1)
    sizes = [int(size) for size in batches.split(",")]
    subjects = {"fashion-ar": FashionAR(), "fashion-lpd": FashionLPD(**GUIDED)}
    kept = {name: Cells(out, zoo.load(name).card.files["model.safetensors"]) for name in subjects}
    rows = [row for row in ROWS if only in row.name]
    found: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds):
        for size in sizes:
            for row in rows:
                policy = policy_of(row.policy, out.with_suffix(".offsets.json"))
                setting = Setting(policy, row.budget, Decoder.parse(row.decoder))
                subject = subjects[row.model]
                seconds = kept[row.model].measured(
                    {"row": row.name, "batch": size, "round": turn},
                    lambda subject=subject, setting=setting, size=size, turn=turn: (
                        subject.generate(setting, size, turn, lambda count: None).seconds
                    ),
                )
                found.setdefault((row.name, size), []).append(seconds)
    typer.echo(f"| drawn by | {' | '.join(f'batch {size}' for size in sizes)} |")
    typer.echo("| --- |" + " --: |" * len(sizes))
    for row in rows:
        fastest = [f"{size / min(found[row.name, size]):.2f}" for size in sizes]
        typer.echo(f"| {row.name} | {' | '.join(fastest)} |")


if __name__ == "__main__":
    typer.run(main)
