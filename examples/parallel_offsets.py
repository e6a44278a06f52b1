"""Where the heads of a model look, by offset: docs/parallel-offsets.png.

kvpolicy offsets --subject fashion-lpd --decoder lpd:passes=48 --out offsets.json
python examples/parallel_offsets.py offsets.json parallel-offsets.png
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm

from kvpolicy.parts.offsets import read_offsets


def main(file: str, out: str) -> None:
    found = read_offsets(file)
    panels = [
        (f"layer {layer}, head {head}", offsets)
        for layer, heads in enumerate(found.layers)
        for head, offsets in enumerate(heads)
    ]
    rows = 2 if len(panels) == 8 else len(found.layers)
    figure, axes = plt.subplots(
        rows,
        len(panels) // rows,
        figsize=(9.4, 2.5 * rows),
        layout="constrained",
        squeeze=False,
    )
    most = max(max(map(max, offsets.near)) for _, offsets in panels)
    edge = found.radius + 0.5
    ticks = (-found.radius, 0, found.radius)
    for axis, (title, offsets) in zip(axes.flat, panels, strict=True):
        near = np.array(offsets.near)
        near[found.radius, found.radius] = np.nan  # the query's own place
        image = axis.imshow(
            near,
            extent=(-edge, edge, edge, -edge),
            cmap="viridis",
            norm=PowerNorm(0.5, vmin=0, vmax=most),
        )
        axis.set_facecolor("white")
        axis.set_title(f"{title}\nfarther: {offsets.far:.4f}", fontsize=8)
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("columns right", fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("rows below", fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    bar.set_label("attention to such a token", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:3])
