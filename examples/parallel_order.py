"""In which order an image comes in 48 passes, and what is cached meanwhile: docs/parallel.png.

python examples/parallel_order.py parallel.png
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from kvpolicy import Parallel
from kvpolicy_adapters import zoo

MOMENTS = (12, 24, 36)
POLICIES = (("ahead", "1/4"), ("near", "1/4"))


def main(out: str, passes: int = 48) -> None:
    box, decoder = zoo.load("fashion-lpd"), Parallel(passes=passes)
    layout = decoder.ordered(box.grid)
    group = np.empty(784, int)
    group[list(layout.order)] = np.repeat(np.arange(passes), layout.groups)
    figure, axes = plt.subplots(len(POLICIES), 2 + len(MOMENTS), figsize=(11, 4.8))
    for row, (policy, budget) in zip(axes, POLICIES, strict=True):
        with box.attached(policy, budget, layout) as cache:
            shown = watch(cache, len(layout.order))
            pixels = box.draw(torch.tensor([5]), cache, decoder, seed=1)
        row[0].imshow(group.reshape(28, 28), cmap="viridis")
        row[0].set_title("pass in which it comes", fontsize=8)
        row[1].imshow(box.fashion.images(pixels)[0], cmap="gray_r")
        row[1].set_title(f"drawn under {policy}, {budget}", fontsize=8)
        for axis, moment in zip(row[2:], MOMENTS, strict=True):
            picture = np.zeros(784)
            picture[group < moment] = 0.35
            held = layout.place(shown[moment]) - 1
            picture[held[held >= 0]] = 1.0
            picture[group == moment] = 0.7
            axis.imshow(picture.reshape(28, 28), cmap="magma", vmin=0, vmax=1)
            axis.set_title(f"{policy}: before pass {moment}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def watch(cache: Any, tokens: int) -> list[torch.Tensor]:
    """Positions that the first head of layer 1 holds after each commit, as they come."""
    held: list[torch.Tensor] = []
    commit = cache.commit

    def committed(count: int) -> None:
        commit(count)
        positions = cache.positions(1)[0, 0]
        held.append(positions[(positions >= 0) & (positions <= tokens)].long())

    cache.commit = committed
    return held


if __name__ == "__main__":
    main(*sys.argv[1:2])
