"""Files and folders that are either there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["UNFINISHED", "whole_folder", "write_whole"]

#: What the name of a file or folder ends with while it is being written.
UNFINISHED = ".new"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new."""
    fresh = path.with_name(path.name + UNFINISHED)
    data = content.encode() if isinstance(content, str) else content
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into; it appears at ``path`` when the block ends, complete.

    An exception leaves at ``path`` what was there. A crash at any moment leaves that, or the new
    folder, or (between two renames) nothing; what it left beside them is cleared the next time.

    Args:
        path: where the folder shall be; one that is there is replaced. Its parent must exist.
    """
    fresh, old = (path.with_name(path.name + end + UNFINISHED) for end in ("", ".old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        _sync_folder(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make renames inside a folder last; where folders can't be opened, the system does it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
