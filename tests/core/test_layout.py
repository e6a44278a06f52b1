"""Layouts are arithmetic: compared with an image walked through token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvpolicy import RasterLayout, TextLayout, TokenLayout

RASTERS = st.builds(
    RasterLayout,
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    line_break=st.integers(0, 1),
    prefix=st.integers(0, 8),
    suffix=st.integers(0, 9),
)
TEXTS = st.builds(TextLayout, sinks=st.integers(0, 8), line_length=st.integers(1, 9))


def walked(layout: TokenLayout, count: int):
    """(line, column) of every position behind the prefix, by walking."""
    line, column, places = 0, 0, {}
    for position in range(layout.prefix, count):
        places[position] = (line, column)
        column += 1
        if column == layout.line_length:
            line, column = line + 1, 0
    return places


@given(st.one_of(RASTERS, TEXTS))
def test_lines_and_columns(layout):
    count = layout.length or 50
    places = walked(layout, count)
    for position, (line, column) in places.items():
        assert layout.line(position) == line
        assert layout.column(position) == column
        assert layout.is_line_start(position) is (column == 0)
    for position in range(layout.prefix):
        assert layout.line(position) < 0
        assert not layout.is_line_start(position)


@given(st.one_of(RASTERS, TEXTS))
def test_tensors_are_answered_like_integers(layout):
    positions = torch.arange(layout.length or 50).view(1, -1, 1)
    for ask in (layout.line, layout.column):
        answer = ask(positions)
        assert answer.shape == positions.shape
        assert answer.flatten().tolist() == [ask(int(position)) for position in positions.flatten()]
    pinned = layout.is_pinned(positions).flatten()
    assert pinned.tolist() == [position < layout.prefix for position in range(len(pinned))]
    assert not layout.is_pinned(torch.tensor([-1])), "an empty slot is not pinned"


@given(RASTERS)
def test_lengths(layout):
    tokens = layout.prefix + layout.suffix
    for _row in range(layout.rows):
        tokens += layout.cols + layout.line_break
    assert layout.length == tokens
    assert layout.evictable == tokens - layout.prefix
    assert not layout.compresses_prompt


def test_text():
    layout = TextLayout(sinks=4)
    assert (layout.prefix, layout.length, layout.evictable, layout.line_length) == (
        4,
        None,
        None,
        1,
    )
    assert TextLayout(sinks=4, length=10).evictable == 6
    assert layout.compresses_prompt


@given(st.one_of(RASTERS, TEXTS))
def test_a_layout_is_a_value(layout):
    assert isinstance(layout, TokenLayout)
    assert type(layout).model_validate_json(layout.model_dump_json()) == layout
    assert hash(layout) == hash(layout.model_copy())
    with pytest.raises(ValidationError, match="frozen"):
        layout.__setattr__(next(iter(type(layout).model_fields)), 3)
