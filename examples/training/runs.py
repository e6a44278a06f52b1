"""What every training run writes: checkpoints and exports, replaced in one move, and a log."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import typer


def replace_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: a kill at any moment leaves a whole one behind, the old or the new."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a new folder, and put each of its files where the old ones are."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for file in fresh.iterdir():
        os.replace(file, folder / file.name)
    fresh.rmdir()


def require_same(
    path: Path, saved: dict[str, Any], mine: dict[str, Any], names: Iterable[str] | None = None
) -> None:
    """Refuse a checkpoint that was made with other values of what is named (of all, by default).

    Raises:
        BadParameter: with the names of those that differ.
    """
    names = mine if names is None else names
    if changed := [name for name in names if saved.get(name) != mine[name]]:
        raise typer.BadParameter(f"{path} was made with other values of: {', '.join(changed)}")


def write_log(folder: Path, step: int, seconds: float, **entry: Any) -> None:
    """Append a line to the folder's ``log.jsonl``, and print it."""
    line = json.dumps({"step": step, "seconds": round(seconds, 1), **entry})
    with (folder / "log.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)
