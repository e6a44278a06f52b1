"""The folder of drawn images: what was asked for, what has been drawn, and the pictures.

::

    plan.json      what was asked for
    index.jsonl    one line an image: prompt or class, seed, setting, seconds, peak, digest
    images/…       the pictures, in the layout that evaluators want (see prompts.py)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.files import UNFINISHED, write_whole
from kvpolicy.lab.run.records import read_record

__all__ = ["DrawFolder", "DrawPlan"]

_PLAN, _INDEX = "plan.json", "index.jsonl"


class DrawPlan(BaseModel):
    """What is drawn: all that decides what the pictures look like.

    Attributes:
        model: its name, and the path behind it.
        model_bytes: size of the checkpoint, where it is a file.
        vq: the decoder's file.
        options: of the model.
        policy: its name.
        parameters: all of the policy's, defaults included.
        budget: as it was spelled; None for everything.
        sampler: guidance, temperature, top-k, top-p, decoder.
        seed: of all random numbers.
        dtype: of the weights.
        batch: images that share their random numbers; None where each has its own.
        items: SHA-256 of the list of items.
        count: items.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_bytes: int | None = None
    vq: str | None = None
    options: dict[str, Any] = {}
    policy: str
    parameters: dict[str, Any]
    budget: str | None
    sampler: dict[str, Any]
    seed: int
    dtype: str | None
    batch: int | None = None
    items: str
    count: int

    def text(self) -> str:
        """The file's content: JSON with one field a line, the same for equal plans."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


class DrawFolder:
    """A folder of pictures that grows item by item; see the top of this file.

    A picture counts once its line stands in the index, which is written after the picture. A crash
    between the two costs that one picture, which is drawn again.

    Args:
        path: the folder.
        plan: what is asked for.
        items: the same, image by image.

    Raises:
        ParameterError: the folder holds another plan (the message shows the difference), or is that
            of something else.
        OSError: it can't be written.
    """

    def __init__(self, path: Path, plan: DrawPlan, items: Sequence[Item]) -> None:
        self.path = path
        self._items = {item.path: item for item in items}
        file = path / _PLAN
        if file.exists():
            held = read_record(DrawPlan, file)
            if held != plan:
                lines = unified_diff(
                    held.text().splitlines(), plan.text().splitlines(), "there", "asked for", n=0
                )
                raise ParameterError(
                    f"{path} holds images of another plan; take another folder, or the same "
                    f"plan:\n" + "\n".join(line.rstrip() for line in lines)
                )
        elif any(entry.name not in _EARLY for entry in path.iterdir()):
            raise ParameterError(f"{path} is not empty, and holds no plan; take another folder")
        else:
            write_whole(file, plan.text())
        for left in path.rglob(f"*.png{UNFINISHED}"):
            left.unlink(missing_ok=True)
        self.finished = self._sound()

    def keep(self, item: Item, png: bytes, about: dict[str, Any]) -> None:
        """Write a picture, then its line in the index.

        Raises:
            OSError: the disk is full; what was kept before is whole.
        """
        target = self.path / item.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if item.path.startswith("geneval/"):
            metadata = target.parent.parent / "metadata.jsonl"
            if not metadata.exists():
                write_whole(metadata, json.dumps({**item.about, "prompt": item.prompt}) + "\n")
        write_whole(target, png)
        line = {"path": item.path, **about, "sha256": hashlib.sha256(png).hexdigest()}
        self._append(json.dumps(line) + "\n")
        self.finished[item.path] = line

    def lines(self) -> Iterator[dict[str, Any]]:
        """The index's lines of what has been drawn, in the order of the items."""
        return (self.finished[path] for path in self._items if path in self.finished)

    def _append(self, line: str) -> None:
        """One line behind the others, or none of it."""
        data = line.encode()
        # Without a buffer, which would write what is left when the file is closed.
        with (self.path / _INDEX).open("ab", buffering=0) as index:
            before = index.tell()
            try:
                while data:
                    data = data[index.write(data) :]
                os.fsync(index.fileno())
            except OSError:
                index.truncate(before)
                raise

    def _sound(self) -> dict[str, dict[str, Any]]:
        """Lines whose pictures are there as they were written; the index is left with those."""
        index = self.path / _INDEX
        raw = index.read_bytes().splitlines(keepends=True) if index.exists() else []
        found: dict[str, dict[str, Any]] = {}
        for line in raw:
            try:
                about = json.loads(line)
                png = (self.path / about["path"]).read_bytes()
                sound = hashlib.sha256(png).hexdigest() == about["sha256"]
            except (ValueError, KeyError, TypeError, OSError):
                continue  # a line that a crash cut off, or a picture that is gone
            if sound and about["path"] in self._items and line.endswith(b"\n"):
                found.setdefault(about["path"], about)
        if len(found) != len(raw):
            write_whole(index, "".join(json.dumps(about) + "\n" for about in found.values()))
        return found


#: What may lie in a folder in which a run has not got as far as its plan.
_EARLY = {".lock", _PLAN + UNFINISHED}
