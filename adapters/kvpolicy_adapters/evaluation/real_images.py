"""Real images for a checkpoint: a folder, what each shows, and the square that a model sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.score.pictures import INDEX, KINDS, read_index

__all__ = ["RealImages", "read_real_images"]


@dataclass(frozen=True)
class RealImages:
    """Images of a folder, in order, with what they show.

    Attributes:
        folder: where they are.
        files: of the images.
        items: what each would be drawn for: a class, or a prompt.
    """

    folder: Path
    files: tuple[Path, ...]
    items: tuple[Item, ...]

    def pixels(self, first: int, count: int, rows: int, cols: int) -> Tensor:
        """Images, uint8 ``[count, rows, cols, 3]``: the middle, resized (bicubic).

        Raises:
            ParameterError: an image can't be read.
        """
        found = []
        for file in self.files[first : first + count]:
            try:
                with Image.open(file) as image:
                    fitted = ImageOps.fit(
                        image.convert("RGB"), (cols, rows), Image.Resampling.BICUBIC
                    )
            except (UnidentifiedImageError, OSError, ValueError) as error:
                raise ParameterError(
                    f"images: {file} can't be read as a picture: {error}"
                ) from None
            found.append(np.asarray(fitted))
        return torch.from_numpy(np.stack(found))


def read_real_images(folder: str | Path, classes: int | None) -> RealImages:
    """Find images, and the class or the prompt of each.

    In this order: ``index.jsonl``, whose lines have ``path`` and ``class`` or ``prompt`` (as
    ``kvpolicy draw`` writes it); for classes, a folder a class, which are numbered in the order of
    their names (ImageNet's synsets are); for prompts, a text beside each image (``fox.jpg`` and
    ``fox.txt``). Those of folders come the classes in turn, so that the first so many show all.

    Args:
        folder: of images.
        classes: that the model knows; None for a model of prompts.

    Raises:
        ParameterError: there is no image, or one of them has no class or prompt.
        OSError: it can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ParameterError(f"option images={str(folder)!r} is no folder")
    index = folder / INDEX
    if index.exists():
        pairs = [(folder / str(line["path"]), line) for line in read_index(index)]
    elif classes is None:
        pairs = [(file, {"prompt": _beside(file)}) for file in _images(folder)]
    else:
        pairs = _by_class(folder)
    if not pairs:
        raise ParameterError(f"option images: {folder} holds no pictures ({', '.join(KINDS)})")
    items = tuple(_item(file, about, row, classes) for row, (file, about) in enumerate(pairs))
    return RealImages(folder, tuple(file for file, _ in pairs), items)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS)


def _beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    if not text.exists():
        raise ParameterError(
            f"option images: {file} has no prompt; write it into {text.name} beside it, or all "
            f"into "
            f'{INDEX} of the folder, a line each: {{"path": ..., "prompt": ...}}'
        )
    return " ".join(text.read_text(encoding="utf-8-sig").split())


def _by_class(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = [
        (turn, number, file)
        for number, each in enumerate(sorted(entry for entry in folder.iterdir() if entry.is_dir()))
        for turn, file in enumerate(_images(each))
    ]
    return [(file, {"class": number}) for _, number, file in sorted(found)]


def _item(file: Path, about: dict[str, Any], row: int, classes: int | None) -> Item:
    name = "prompt" if classes is None else "class"
    value = about.get(name)
    if classes is None:
        if not isinstance(value, str) or not value.strip():
            raise ParameterError(f"option images: {file} has no {name}")
        return Item(str(file), row, 0, value)
    if type(value) is not int or not 0 <= value < classes:
        raise ParameterError(
            f"option images: {file} is of class {value!r}; the model has 0 to {classes - 1}"
        )
    return Item(str(file), value, row)
