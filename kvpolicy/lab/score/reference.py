"""What drawn images are compared with: real pictures, or published statistics of them."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpolicy.errors import ParameterError
from kvpolicy.lab.score.pictures import Pictures, read_pictures

__all__ = ["Reference", "read_reference"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """Real images.

    Attributes:
        source: folder or file.
        pictures: the images; None where the file holds statistics only.
        moments: mean ``[F]`` and covariance ``[F, F]`` of their features, as published; None where
            they are to be computed.
    """

    source: Path
    pictures: Pictures | None
    moments: tuple[Array, Array] | None


def read_reference(source: Path) -> Reference:
    """Read a folder of pictures, or an ``.npz``.

    The file is pytorch-fid's (``mu``, ``sigma``) or ADM's, which has the images of precision and
    recall beside them (``arr_0``), or holds images only.

    Raises:
        ParameterError: it is none of these.
        OSError: it can't be read.
    """
    if source.suffix != ".npz":
        return Reference(source, read_pictures(source), None)
    try:
        with np.load(source) as held:
            names = set(held.files)
            moments = None
            if {"mu", "sigma"} <= names:
                moments = (np.asarray(held["mu"]), np.asarray(held["sigma"]))
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ParameterError(f"{source} can't be read as an .npz of arrays: {error}") from None
    if moments is None and "arr_0" not in names:
        held_names = ", ".join(sorted(names)) or "nothing"
        raise ParameterError(
            f"{source} holds {held_names}; an .npz of real images has mu and sigma (statistics, as "
            f"pytorch-fid writes them), arr_0 (images), or all three (ADM's)"
        )
    pictures = read_pictures(source) if "arr_0" in names else None
    if moments is None:
        return Reference(source, pictures, None)
    mean, covariance = moments
    numbers = mean.dtype.kind == covariance.dtype.kind == "f"
    if not numbers or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ParameterError(
            f"{source}: mu and sigma must be numbers [F] and [F, F], not {mean.dtype} "
            f"{list(mean.shape)} and {covariance.dtype} {list(covariance.shape)}"
        )
    return Reference(source, pictures, (mean.astype(np.float64), covariance.astype(np.float64)))
