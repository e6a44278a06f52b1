"""Fashion-MNIST as the tokens of fashion-ar, for the scripts beside this file.

Tokens 0..15 are grey levels (``pixel // 16``), 16..25 the ten classes, 26 "any class".
The four gzipped IDX files come with Debian's package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
ROWS = COLS = 28
GREYS, CLASSES = 16, 10
ANY_CLASS = GREYS + CLASSES
VOCAB = ANY_CLASS + 1


def read_idx(path: Path) -> Tensor:
    """Read one gzipped IDX file (the format of MNIST) of unsigned bytes, in its own shape."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    return torch.from_numpy(data.copy())


def read_tokens(folder: Path, split: str) -> Tensor:
    """Class token, then 784 grey levels, of all images of ``train`` or ``t10k``: uint8 [n, 785]."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return torch.cat([labels[:, None] + GREYS, images.flatten(1) // 16], dim=1)
