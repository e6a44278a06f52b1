"""What is made of drawn images once they are there: arrays, grids and sheets for evaluators."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.files import UNFINISHED, write_whole

__all__ = ["read_image", "write_grids", "write_npz"]

#: DPG's evaluator (``--pic-num``) takes a prompt's image, or up to four of them, two by two.
_GRID = 4


def read_image(path: Path) -> NDArray[np.uint8]:
    """A picture as uint8 ``[rows, cols]``, or ``[rows, cols, 3]`` in colour."""
    with Image.open(path) as image:
        return np.asarray(image)


def write_npz(folder: Path, items: Sequence[Item]) -> Path:
    """``samples.npz`` as ADM's evaluator takes it: ``arr_0``, uint8 ``[n, rows, cols, 3]``.

    Of classes, ``arr_1`` holds them, int64 ``[n]``. The pictures are read one by one: 50,000 of
    them would not fit into memory.

    Raises:
        ParameterError: the pictures have different sizes.
        OSError: the disk is full; nothing is left of the file.
    """
    first = _colour(read_image(folder / items[0].path))
    path = folder / "samples.npz"
    fresh = path.with_name(path.name + UNFINISHED)
    try:
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            shape = (len(items), *first.shape)
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                array.write(_header(shape, np.dtype(np.uint8)))
                for item in items:
                    image = _colour(read_image(folder / item.path))
                    if image.shape != first.shape:
                        raise ParameterError(
                            f"{folder / item.path} has the shape {image.shape}, but "
                            f"{items[0].path} has {first.shape}; an array needs one size"
                        )
                    array.write(np.ascontiguousarray(image).tobytes())
            if items[0].prompt is None:
                classes = np.array([item.row for item in items], np.int64)
                with archive.open("arr_1.npy", "w") as array:
                    array.write(_header(classes.shape, classes.dtype) + classes.tobytes())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return path


def write_grids(folder: Path, items: Sequence[Item]) -> list[Path]:
    """``dpg/NAME.png`` for each prompt of DPG's: its image, or two to four of them, two by two.

    Where fewer than four were drawn, the last places stay black: nobody looks there.
    """
    written = []
    for name, drawn in _by_name(items):
        if len(drawn) > _GRID:
            continue
        images = [read_image(folder / item.path) for item in drawn]
        if len(images) > 1:
            images += [np.zeros_like(images[0])] * (_GRID - len(images))
            images = [
                np.concatenate([np.concatenate(images[at : at + 2], axis=1) for at in (0, 2)])
            ]
        made = io.BytesIO()
        Image.fromarray(images[0]).save(made, "PNG")
        path = folder / "dpg" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, made.getvalue())
        written.append(path)
    return written


def _by_name(items: Sequence[Item]) -> Iterator[tuple[str, list[Item]]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        if "dpg" in item.about:
            found.setdefault(item.about["dpg"], []).append(item)
    yield from found.items()


def _colour(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    written = io.BytesIO()
    npy.write_array_header_1_0(
        written, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return written.getvalue()
