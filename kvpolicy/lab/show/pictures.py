"""Pictures of what policies draw and of what they keep."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

__all__ = ["contact_sheet", "pass_sheet", "retention_sheet"]

_GONE = "#ececec"
#: Letters of a line above a column, and lines: prompts are longer than names of classes.
_LETTERS, _LINES = 13, 4
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.facecolor": "white",
    "text.parse_math": False,  # labels are other people's: a "$" is a dollar
}


def contact_sheet(
    rows: Sequence[tuple[str, str, Sequence[NDArray[np.uint8]]]],
    column_names: Sequence[str],
    title: str,
) -> Figure:
    """One row a policy, one column a class.

    Args:
        rows: name, remark, and images of each policy, one a column: uint8 ``[height, width]``,
            whose 0 is shown white, or ``[height, width, 3]`` in colour.
        column_names: what stands above the columns; what is long is broken into lines.
        title: what the reader looks at.

    Returns:
        The figure; ``figure.savefig(path, dpi=200)`` writes it.
    """
    columns = len(column_names)
    headings = [
        textwrap.fill(name, _LETTERS, max_lines=_LINES, placeholder=" …") for name in column_names
    ]
    lines = max((heading.count("\n") for heading in headings), default=0)
    cell, top = 0.72, 0.62 + 0.12 * lines
    left = max(1.45, 0.3 + 0.074 * max(len(name) for name, _, _ in rows))
    size = (left + columns * cell + 0.1, top + len(rows) * cell + 0.1)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        figure.text(0.1 / size[0], 1 - 0.14 / size[1], title, va="top", weight="bold", size=9)
        for r, (name, remark, images) in enumerate(rows):
            bottom = size[1] - top - (r + 1) * cell
            middle = (bottom + cell / 2) / size[1]
            x = (left - 0.1) / size[0]
            figure.text(x, middle + 0.02, name, ha="right", va="bottom", size=8.5)
            figure.text(x, middle, remark, ha="right", va="top", size=6.5, color="0.4")
            for c in range(columns):
                axes = figure.add_axes(
                    (
                        (left + c * cell) / size[0],
                        (bottom + 0.03) / size[1],
                        (cell - 0.06) / size[0],
                        (cell - 0.06) / size[1],
                    )
                )
                grey = images[c].ndim == 2
                axes.imshow(255 - images[c] if grey else images[c], cmap="gray", vmin=0, vmax=255)
                _bare(axes)
                if r == 0:
                    axes.set_title(headings[c], size=7 if lines == 0 else 6, pad=4)
    return figure


def retention_sheet(
    image: NDArray[np.uint8],
    rows: Sequence[tuple[str, str, NDArray[np.float64]]],
    moments: Sequence[int],
    title: str,
) -> Figure:
    """Which tokens of an image are still cached: policies down, moments and layers across.

    Args:
        image: the real image whose tokens were fed, uint8 ``[height, width]``, whose 0 is shown
            white, or ``[height, width, 3]`` in colour; with as many pixels a token as it likes.
        rows: name, remark, and the share of heads that hold each token, ``[moments, layers,
            rows, cols]``, of each policy.
        moments: numbers of image tokens after which was looked.
        title: what the reader looks at.

    Returns:
        The figure; ``figure.savefig(path, dpi=200)`` writes it.
    """
    layers, grid = rows[0][2].shape[1], rows[0][2].shape[2:]
    total = grid[0] * grid[1]
    cell, gap, left, top, bottom_margin = 0.62, 0.16, 1.55, 0.92, 0.5
    # A heading needs its width, however few layers stand under it.
    group = max(layers * cell, 1.6)
    width = left + len(moments) * (group + gap)
    size = (width, top + len(rows) * cell + bottom_margin)
    colours = LinearSegmentedColormap.from_list(
        "kept", matplotlib.colormaps["Blues"](np.linspace(0.4, 1.0, 64))
    ).with_extremes(under=_GONE)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        figure.text(0.1 / size[0], 1 - 0.14 / size[1], title, va="top", weight="bold", size=9)

        def place(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
            return x / size[0], y / size[1], w / size[0], h / size[1]

        mesh = None
        for m, moment in enumerate(moments):
            x = left + m * (group + gap)
            # Tokens to come are white, tokens gone grey, so that the two can't be confused.
            come = (np.arange(total) < moment).reshape(grid)
            figure.text(
                (x + layers * cell / 2) / size[0],
                (size[1] - top + 0.3) / size[1],
                f"after {moment} of {total} tokens",
                ha="center",
                size=8.5,
            )
            for r, (name, remark, kept) in enumerate(rows):
                y = size[1] - top - (r + 1) * cell
                if m == 0:
                    edge = (left - 0.1) / size[0]
                    middle = (y + cell / 2) / size[1]
                    figure.text(edge, middle + 0.01, name, ha="right", va="bottom", size=8.5)
                    figure.text(edge, middle, remark, ha="right", va="top", size=6.5, color="0.4")
                for layer in range(layers):
                    axes = figure.add_axes(
                        place(x + layer * cell + 0.02, y + 0.02, cell - 0.04, cell - 0.04)
                    )
                    shown = np.where(come, kept[m, layer], np.nan)
                    shown = np.where(come & (kept[m, layer] == 0), -1.0, shown)
                    mesh = axes.imshow(
                        np.ma.masked_invalid(shown), cmap=colours, vmin=0.001, vmax=1.0
                    )
                    axes.set_xticks([])
                    axes.set_yticks([])
                    for spine in axes.spines.values():
                        spine.set_linewidth(0.4)
                        spine.set_color("0.6")
                    if r == 0:
                        axes.set_title(f"layer {layer}", size=6.5, pad=2, color="0.3")
        # Legend: colour scale, gone, to come, and the image itself.
        if mesh is not None:
            bar = figure.colorbar(
                mesh, cax=figure.add_axes(place(left, 0.27, 1.6, 0.09)), orientation="horizontal"
            )
            bar.set_ticks([0.25, 0.5, 0.75, 1.0])
            bar.ax.tick_params(labelsize=6.5, length=2)
            bar.outline.set_linewidth(0.4)
            figure.text(
                (left + 1.7) / size[0], 0.27 / size[1], "share of heads that hold it", size=7
            )
        figure.legend(
            handles=[
                Patch(facecolor=_GONE, edgecolor="0.6", linewidth=0.4, label="evicted"),
                Patch(facecolor="white", edgecolor="0.6", linewidth=0.4, label="not yet drawn"),
            ],
            loc="lower left",
            bbox_to_anchor=((left + 3.1) / size[0], 0.17 / size[1]),
            ncols=2,
            frameon=False,
            fontsize=7,
            handlelength=1.2,
        )
        corner = figure.add_axes(place(0.35, size[1] - top + 0.06, 0.5, 0.5))
        corner.imshow(255 - image if image.ndim == 2 else image, cmap="gray", vmin=0, vmax=255)
        _bare(corner)
        figure.text(
            0.9 / size[0], (size[1] - top + 0.26) / size[1], "the image", size=6.5, color="0.4"
        )
    return figure


def _bare(axes: Axes) -> None:
    """Nothing but the image."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def pass_sheet(
    rows: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.integer[Any]]]], title: str
) -> Figure:
    """In which pass of a decoder each token of an image was settled.

    Args:
        rows: name, image (uint8 ``[height, width]``, whose 0 is shown white) and passes, from 1,
            ``[rows, cols]`` of each decoder.
        title: what the reader looks at.

    Returns:
        The figure; ``figure.savefig(path, dpi=200)`` writes it.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.5 * len(rows) + 0.3, 4.6), layout="constrained")
        figure.suptitle(title, weight="bold", size=9)
        axes = figure.subplots(2, len(rows), squeeze=False, height_ratios=(1, 1.3))
        for column, (name, image, passes) in enumerate(rows):
            axes[0, column].imshow(image, cmap="Greys", vmin=0, vmax=255)
            axes[0, column].set_title(f"{name}: {int(passes.max())} passes")
            # Each pass another shade than its neighbours, and the whole from early to late.
            shown = axes[1, column].imshow(passes, cmap="viridis")
            figure.colorbar(shown, ax=axes[1, column], orientation="horizontal", label="pass")
            later = np.diff(passes.ravel(), prepend=0) > 0
            for place in np.flatnonzero(later):
                line, at = divmod(int(place), passes.shape[1])
                axes[1, column].plot(
                    [at - 0.5, at - 0.5], [line - 0.5, line + 0.5], color="white", linewidth=0.7
                )
            for shown_axes in axes[:, column]:
                shown_axes.set_xticks([])
                shown_axes.set_yticks([])
    return figure
