"""Sets of pictures: a folder that ``kvpolicy draw`` made, any folder, or ADM's array of images."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from kvpolicy.errors import ParameterError

__all__ = ["INDEX", "KINDS", "Pictures", "read_index", "read_pictures"]

INDEX = "index.jsonl"
#: How names of pictures end.
KINDS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size, read as they are asked for.

    Attributes:
        source: the folder or file.
        files: of the pictures, in order; empty where an array holds them.
        count: how many there are.
        size: rows and columns of pixels.
        prompts: what each was drawn for; None where they have none.
    """

    source: Path
    files: tuple[Path, ...]
    count: int
    size: tuple[int, int]
    prompts: tuple[str, ...] | None = None

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """The pictures in order, uint8 ``[n, rows, cols, 3]``, up to ``size`` at a time.

        Raises:
            ParameterError: a picture can't be read, or has another size than the first.
        """
        if not self.files:
            yield from _array_batches(self.source, size)
            return
        for first in range(0, self.count, size):
            yield np.stack([self._read(file) for file in self.files[first : first + size]])

    def _read(self, file: Path) -> NDArray[np.uint8]:
        pixels = _colour(file)
        if pixels.shape[:2] != self.size:
            raise ParameterError(
                f"{file} is {_spell(pixels.shape[:2])} pixels, but {self.files[0]} is "
                f"{_spell(self.size)}; all pictures of a set need one size: crop and resize them "
                f"first"
            )
        return pixels


def read_pictures(source: Path) -> Pictures:
    """Find the pictures of a folder or an ``.npz``.

    A folder of ``kvpolicy draw`` is what its ``index.jsonl`` lists, and nothing else that lies in
    it; of any other folder, all pictures in it and below it, sorted by path. Of an ``.npz``, the
    array ``arr_0`` as ADM's evaluator takes it: uint8 ``[n, rows, cols, 3]``.

    Raises:
        ParameterError: there are no pictures, a line of the index can't be read, or a picture that
            it lists is gone.
        OSError: it can't be read.
    """
    if source.suffix == ".npz":
        return _of_array(source)
    if not source.is_dir():
        raise ParameterError(f"{source} is no folder of pictures, and no .npz")
    index = source / INDEX
    prompts: tuple[str, ...] | None = None
    if index.exists():
        lines = read_index(index)
        files = tuple(source / str(line["path"]) for line in lines)
        gone = [file for file in files if not file.exists()]
        if gone:
            raise ParameterError(
                f"{index} lists {gone[0].relative_to(source)}, which is gone; the command that "
                f"drew the folder draws it again"
            )
        if lines and all(isinstance(line.get("prompt"), str) for line in lines):
            prompts = tuple(str(line["prompt"]) for line in lines)
    else:
        files = tuple(sorted(file for file in source.rglob("*") if file.suffix.lower() in KINDS))
    if not files:
        raise ParameterError(f"{source} holds no pictures ({', '.join(KINDS)})")
    size = _colour(files[0]).shape[:2]
    return Pictures(source, files, len(files), (size[0], size[1]), prompts)


def read_index(file: Path) -> list[dict[str, Any]]:
    """The lines of an ``index.jsonl``, each an object with ``path``.

    Raises:
        ParameterError: one is something else; the message says which.
        OSError: it can't be read.
    """
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            about = json.loads(line)
            about["path"]
        except (ValueError, KeyError, TypeError):
            raise ParameterError(
                f"{file}: line {number} is no JSON object with 'path'; where kvpolicy draw wrote "
                f"it, the same command mends it"
            ) from None
        found.append(about)
    return found


def _colour(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ParameterError(f"{file} can't be read as a picture: {error}") from None


def _of_array(source: Path) -> Pictures:
    with _opened(source) as array:
        shape = _shape(source, array)
    return Pictures(source, (), shape[0], (shape[1], shape[2]))


def _array_batches(source: Path, size: int) -> Iterator[NDArray[np.uint8]]:
    """Rows of the array, read from the file as they are asked for: it may not fit into memory."""
    with _opened(source) as array:
        count, *each = _shape(source, array)
        row = int(np.prod(each))
        for first in range(0, count, size):
            wanted = min(size, count - first)
            data = array.read(wanted * row)
            if len(data) != wanted * row:
                raise ParameterError(f"{source} ends before its {count} pictures do")
            yield np.frombuffer(data, np.uint8).reshape(wanted, *each)


def _opened(source: Path) -> IO[bytes]:
    try:
        return zipfile.ZipFile(source).open("arr_0.npy")
    except zipfile.BadZipFile:
        raise ParameterError(f"{source} is no .npz, or its end is missing") from None
    except KeyError:
        raise ParameterError(f"{source} holds no pictures: it has no array arr_0") from None


def _shape(source: Path, array: IO[bytes]) -> tuple[int, ...]:
    """The shape that the array's header says."""
    try:
        version = npy.read_magic(array)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(array)
    except ValueError as error:
        raise ParameterError(f"{source}: arr_0 can't be read: {error}") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ParameterError(
            f"{source}: arr_0 must be uint8 [n, rows, cols, 3], not {dtype} {list(shape)}"
        )
    return tuple(shape)


def _spell(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
