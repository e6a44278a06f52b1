"""Where a line begins, by its number: from there on tokens lie in that line or later ones."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import OrderedLayout, RasterLayout, TextLayout
from kvpolicy.layout import SequenceLayout, first_of_line

LAYOUTS = [
    RasterLayout(rows=5, cols=4),
    RasterLayout(rows=5, cols=4, prefix=3, line_break=1, suffix=2),
    RasterLayout(rows=3, cols=7, prefix=20),
    TextLayout(sinks=2),
    TextLayout(line_length=6),
    SequenceLayout(prefix=3, pieces=((3, 4), (12, 1), (17, 5))),
    OrderedLayout(grid=RasterLayout(rows=2, cols=3, prefix=1), order=tuple(range(6))),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_it_says_what_the_lines_of_all_tokens_say(layout):
    for seen in range(min(24, layout.length or 24)):
        positions = torch.tensor([*range(seen), -1], dtype=torch.int32)
        for count in range(4):
            line = layout.line(seen) - count
            start = first_of_line(layout, line, seen)
            assert torch.equal(positions >= start, layout.line(positions) >= line), (seen, count)


def test_of_a_layout_whose_lines_may_go_up_and_down_nothing_is_said():
    class Boustrophedon(RasterLayout):
        def line(self, position):
            return super().line(position) ^ 1

    assert first_of_line(Boustrophedon(rows=4, cols=4), 1, 9) is None
