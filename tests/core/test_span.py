"""Spans: tokens or lines, so that a default fits every layout."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy import ParameterError, PolicyCache, RasterLayout, SequenceLayout, TextLayout, create
from kvpolicy.budget.span import first_tokens, tokens_of

PIECES = SequenceLayout(prefix=3, pieces=((3, 5), (23, 4)))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (28, 28),
        (0, 0),
        ("1 line", "1 line"),
        ("1 lines", "1 line"),
        ("2 line", "2 lines"),
        ("02lines", "2 lines"),
        (" 3  lines ", "3 lines"),
    ],
)
def test_one_spelling(given, kept):
    policy = create("linear", anchors=given)
    assert policy.anchors == kept
    assert create(f"linear/anchors={given}") == policy
    assert type(policy).model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize(
    "wrong",
    [-1, 2.0, True, None, [3], "", "3", "lines", "1.5 lines", "-1 lines", "1 Line", "½ line"],
)
def test_what_is_no_span(wrong):
    with pytest.raises(ParameterError, match="anchors="):
        create("linear", anchors=wrong)


@pytest.mark.parametrize(
    ("span", "layout", "tokens", "first"),
    [
        (28, RasterLayout(rows=24, cols=24), 28, 28),
        ("1 line", RasterLayout(rows=28, cols=28, prefix=1), 28, 28),
        ("2 lines", RasterLayout(rows=24, cols=24, line_break=1), 50, 50),
        ("1 line", TextLayout(sinks=4), 1, 1),
        ("2 lines", TextLayout(line_length=64), 128, 128),
        ("2 lines", PIECES, 8, 10),
    ],
)
def test_how_many_tokens_it_is(span, layout, tokens, first):
    assert tokens_of(span, layout) == tokens
    assert first_tokens(span, layout) == first


@pytest.mark.parametrize(
    "layout", [RasterLayout(rows=28, cols=28, prefix=1), TextLayout(line_length=28)]
)
def test_defaults_are_what_they_were_on_a_grid_of_28_columns(layout):
    for name, tokens in (
        ("linear", {"anchors": 28}),
        ("linear2d", {"anchors": 28}),
        ("ssd", {"window": 28}),
    ):
        assert create(name).min_budget(layout) == create(name, **tokens).min_budget(layout)
    half_life = kvpolicy.FadingMass(shape(layout)).keep
    assert half_life == kvpolicy.FadingMass(shape(layout), 28.0).keep


@pytest.mark.parametrize("name", ["linear", "linear2d", "ssd"])
def test_a_line_and_as_many_tokens_decide_alike(name):
    layout = RasterLayout(rows=8, cols=6, prefix=2)
    field, more = ("window", {"local": 0.3}) if name == "ssd" else ("anchors", {})
    held = []
    for given in ({}, {field: "1 line"}, {field: 6}, {field: 2}):
        cache = PolicyCache(create(name, **given, **more), 20, layout=layout, num_layers=1)
        chance = torch.Generator().manual_seed(0)
        for _ in range(layout.length):
            cache.attend(0, *(torch.randn(1, 2, 1, 4, generator=chance) for _ in range(3)))
        held.append(cache.positions(0).sort(-1).values)
    assert torch.equal(held[0], held[1])
    assert torch.equal(held[0], held[2])
    assert not torch.equal(held[0], held[3])
    if name != "ssd":
        for position in range(layout.prefix + 6):
            assert (held[0] == position).any(-1).all()


@pytest.mark.parametrize("cols", [4, 9, 24])
def test_linear_keeps_the_first_line_of_any_grid(cols):
    layout = RasterLayout(rows=6, cols=cols, line_break=1, prefix=1)
    policy = create("linear")
    assert policy.min_budget(layout) == 3 * (cols + 1)
    cache = PolicyCache(policy, policy.min_budget(layout), layout=layout, num_layers=1)
    for _ in range(layout.length):
        cache.attend(0, *torch.randn(3, 1, 1, 1, 4))
    assert set(range(cols + 2)) <= set(cache.positions(0).flatten().tolist())


def shape(layout):
    return kvpolicy.SlotShape(1, 1, 4, torch.device("cpu"), layout)
