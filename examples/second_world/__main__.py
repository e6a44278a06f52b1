"""Run the parts, and write their figures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.commands.arguments import pair
from kvpolicy.lab.run.executors import Inline
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.plan import Cell
from kvpolicy.lab.run.run_folder import CellRecord, Damaged, Failure, open_run
from kvpolicy.lab.run.runner import prepare, run
from second_world.figures import figures_of, page
from second_world.parts import parts


class Lines:
    """A line a cell."""

    def __init__(self, name: str) -> None:
        self.name, self.failures = name, 0

    def begun(self, waiting: Sequence[Cell], finished: Sequence[CellRecord]) -> None:
        print(f"{self.name}: {len(finished)} cells are finished, {len(waiting)} to be measured")

    def damaged(self, item: Damaged) -> None:
        print(f"  {item.cell.label}: measured again: {item.reason}")

    def done(self, record: CellRecord) -> None:
        told = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        at = record.cell.budget or "all"
        print(f"  {record.cell.label} at {at}: {told} ({record.seconds:.0f} s)", flush=True)

    def failed(self, failure: Failure) -> None:
        self.failures += 1
        print(f"  {failure.cell.label} at {failure.cell.budget}: failed: {failure.error}")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs; made, or gone on with.")],
    drawings: Annotated[
        int, typer.Option(min=2, max=400, help="Real pictures to score, of each world.")
    ] = 100,
    pictures: Annotated[int, typer.Option(min=1, help="To draw with each decoder.")] = 4,
    only: Annotated[str, typer.Option(help="Only these parts, separated by commas.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(help="Of the subject clipart-ar, e.g. folder=clipart-ar.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the parts, and stop.")] = False,
    measure: Annotated[
        bool, typer.Option(help="--no-measure writes the figures of what has finished.")
    ] = True,
) -> None:
    """Ask of two worlds what was measured on one; one thread, all of it resumable."""
    given: dict[str, Any] = dict(pair(text, "--option", "folder=here") for text in option or [])
    every = parts(drawings, pictures, given)
    if list_:
        for part in every:
            print(f"{part.name}: {part.about}, {len(part.plan.cells())} cells")
        return
    names = [part.name for part in every]
    wanted = only.split(",") if only else names
    for name in wanted:
        if name not in names:
            raise typer.BadParameter(f"--only {name}: the parts are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for part in every:
        if part.name in wanted and measure:
            begun, watcher = time.perf_counter(), Lines(part.name)
            run(prepare(part.plan), out / part.name, Inline(), threads=1, watcher=watcher)
            failures += watcher.failures
            print(f"  {time.perf_counter() - begun:.0f} s", flush=True)
        found = {
            one.name: figures_of(one, open_run(out / one.name))
            for one in every
            if (out / one.name / "plan.json").exists()
        }
        write_whole(out / "worlds.json", json.dumps(found, indent=1) + "\n")
        write_whole(out / "worlds.md", page(found))
    print(f"wrote {out / 'worlds.json'} and {out / 'worlds.md'}")
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
