"""Folders of small pictures, as ``kvpolicy draw`` leaves them and as others do."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image


def pixels(seed, count=24):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)


def folder_of(path, images, prompts=None):
    """A folder as ``kvpolicy draw`` leaves it; without its index where there are no prompts."""
    (path / "images").mkdir(parents=True)
    lines = []
    for number, image in enumerate(images):
        name = f"images/{number:06d}.png"
        Image.fromarray(image).save(path / name)
        lines.append({"path": name, "prompt": prompts[number]} if prompts else {"path": name})
    if prompts is not None:
        (path / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
