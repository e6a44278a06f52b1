"""Pictures: labelled, aligned, nothing over anything else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvpolicy.lab.show.pictures import contact_sheet, pass_sheet, retention_sheet

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag")
POLICIES = ("full", "linear", "streaming_llm", "a_policy_of_mine")


def collisions(figure: Figure) -> list[str]:
    """Pairs of texts that overlap, texts over images, and what sticks out of the page."""
    canvas = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    canvas.draw()
    texts = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible()
    ]
    images = [axes.get_window_extent(renderer) for axes in figure.axes if axes.images]
    page = figure.bbox
    found = [f"{a} / {b}" for (a, x), (b, y) in itertools.combinations(texts, 2) if x.overlaps(y)]
    found += [f"{a} over an image" for a, x in texts if any(x.overlaps(image) for image in images)]
    found += [
        f"{a} leaves the page"
        for a, x in texts
        if x.x0 < page.x0 or x.y0 < page.y0 or x.x1 > page.x1 or x.y1 > page.y1
    ]
    return found


def sheet(names=CLASSES) -> Figure:
    images = np.zeros((len(names), 28, 28), np.uint8)
    return contact_sheet(
        [(name, "+0.039 bits/pixel", images) for name in POLICIES], names, "A title"
    )


def retained(layers: int = 4, moments: tuple[int, ...] = (392, 588, 784)) -> Figure:
    rng = np.random.default_rng(0)
    rows = [
        (name, "+0.039 bits/pixel", rng.integers(0, 3, (len(moments), layers, 28, 28)) / 2)
        for name in POLICIES
    ]
    return retention_sheet(np.zeros((28, 28), np.uint8), rows, moments, "A title")


def test_the_contact_sheet_has_a_cell_a_policy_and_class_and_no_overlap():
    figure = sheet()
    assert len(figure.axes) == len(POLICIES) * len(CLASSES)
    labels = {text.get_text() for text in figure.findobj(Text)}
    assert {*POLICIES, *CLASSES, "A title"} <= labels
    assert collisions(figure) == []


def test_prompts_stand_above_their_columns_in_lines():
    prompts = ("signs symbols flags europe germany mecklenburg vorpommern", "no words", "", "moon")
    figure = sheet(prompts * 2)
    assert collisions(figure) == []
    headings = [axes.get_title() for axes in figure.axes[:4]]
    assert headings[1:] == ["no words", "", "moon"]
    assert headings[0].startswith("signs symbols\nflags europe\n")
    assert headings[0].count("\n") == 3


def test_overlaps_are_found():
    images = np.zeros((2, 28, 28), np.uint8)
    remark = "a remark that is a good deal longer than the room that there is for it"
    assert collisions(contact_sheet([("full", remark, images)], ("a", "b"), "A title"))


def test_the_contact_sheet_shows_dark_where_the_image_is_bright():
    images = np.zeros((1, 2, 2), np.uint8)
    images[0, 0, 0] = 255
    figure = contact_sheet([("full", "", images)], ("x",), "")
    shown = figure.axes[0].images[0].get_array()
    assert shown.tolist() == [[0, 255], [255, 255]]


@pytest.mark.parametrize("layers", [2, 4, 6])
def test_the_retention_sheet_has_a_map_a_policy_layer_and_moment_and_no_overlap(layers):
    figure = retained(layers)
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == len(POLICIES) * layers * 3 + 1  # and the image itself
    assert collisions(figure) == []


def test_a_retention_sheet_of_a_picture_in_colour_with_pixels_of_its_own():
    kept = np.ones((1, 1, 2, 2))
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    figure = retention_sheet(picture, [("p", "", kept)], (3,), "")
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert maps[0].mask.tolist() == [[False, False], [False, True]]
    assert np.array_equal(maps[-1], picture)  # not its negative, which is for grey ones


def test_the_retention_sheet_tells_kept_evicted_and_not_yet_drawn_apart():
    kept = np.zeros((1, 1, 2, 2))
    kept[0, 0, 0, 0] = 0.5
    figure = retention_sheet(np.zeros((2, 2), np.uint8), [("p", "", kept)], (3,), "")
    shown = figure.axes[0].images[0]
    colours = shown.cmap(shown.norm(shown.get_array()))
    half, gone, _, to_come = colours.reshape(4, 4)
    assert shown.get_array().mask.tolist() == [[False, False], [False, True]]
    assert to_come[3] == 0  # transparent: the white of the page
    assert not np.allclose(half, gone)
    # Readable in grey: what is held is darker than what is gone.
    assert half[:3].mean() < gone[:3].mean() - 0.1


def test_a_pass_sheet_shows_every_image_with_its_passes():
    image = np.zeros((4, 6), np.uint8)
    passes = np.repeat(np.arange(1, 9), 3).reshape(4, 6)
    figure = pass_sheet([("one", image, passes), ("two", image, passes // 2 + 1)], "Passes")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["one: 8 passes", "two: 5 passes"]
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.get_images()]
    assert any(np.array_equal(array, passes) for array in shown)
    ticks = [len(axes.lines) for axes in figure.axes if axes.lines]
    assert ticks == [8, 5]  # a mark where each pass begins
