"""RollingMass, against a plain reading of what it says: a line's worth of queries."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import LineMass, PolicyCache, RasterLayout, RollingMass, SequenceLayout, TextLayout
from kvpolicy.observers import AttentionReport
from kvpolicy.slots import SlotShape

LAYOUTS = st.builds(
    RasterLayout,
    rows=st.integers(2, 4),
    cols=st.integers(1, 6),
    line_break=st.integers(0, 1),
    prefix=st.integers(1, 3),
)


def shape_of(layout, slots):
    return SlotShape(2, 3, slots, torch.device("cpu"), layout)


def feed(observer, layout, mass, cuts=()):
    """Report the mass of all queries, ``[B, H, T, S]``, in runs that end where ``cuts`` say."""
    for start, end in zip([0, *cuts], [*cuts, mass.shape[2]], strict=True):
        observer.observe(AttentionReport(mass[:, :, start:end], start, 0, layout))


def seen_of(layout, seed):
    """Mass of each query of an image, every slot a token: ``[2, 3, T, T]``, and positions."""
    length = layout.length
    mass = torch.rand(2, 3, length, length, generator=torch.Generator().manual_seed(seed)).tril()
    return mass, torch.arange(length, dtype=torch.int32).expand(2, 3, -1)


@settings(deadline=None, max_examples=60)
@given(layout=LAYOUTS, data=st.data())
def test_it_reads_this_line_and_the_one_before_in_the_columns_to_come(layout, data):
    mass, positions = seen_of(layout, 0)
    end = data.draw(st.integers(layout.prefix + 1, layout.length))
    cuts = sorted(data.draw(st.sets(st.integers(1, end - 1), max_size=4))) if end > 1 else []
    observer = RollingMass(shape_of(layout, layout.length))
    feed(observer, layout, mass[:, :, :end], cuts)
    read = observer.mass_at(layout, positions, end)

    line, prefix = layout.line_length, layout.prefix
    column = (end - prefix) % line
    start = end - column if column else end - line
    now = mass[:, :, start:end].sum(2)
    first = 0 if start == prefix else start - line  # the prefix counts as a line before the first
    before = mass[:, :, first:start].sum(2)
    want = now.clone()
    for place in range(layout.length if column else 0):
        if place < prefix:
            want[..., place] += before[..., place] * (line - column) / line
        elif (place - prefix) % line >= column:
            want[..., place] += before[..., place]
    torch.testing.assert_close(read, want)


@settings(deadline=None, max_examples=30)
@given(layout=LAYOUTS, line=st.integers(1, 4))
def test_between_lines_it_reads_what_line_mass_does(layout, line):
    end = layout.prefix + min(line, layout.rows) * layout.line_length
    mass, positions = seen_of(layout, 1)
    rolling = RollingMass(shape_of(layout, layout.length))
    whole = LineMass(shape_of(layout, layout.length))
    for observer in (rolling, whole):
        feed(observer, layout, mass[:, :, :end])
    torch.testing.assert_close(rolling.mass_at(layout, positions, end), whole.mass)


def test_lines_are_those_of_their_piece_of_the_sequence():
    layout = SequenceLayout(prefix=0, pieces=((0, 5), (7, 3)))
    mass = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(9, dtype=torch.int32).expand(2, 3, -1)
    observer = RollingMass(shape_of(layout, 9))
    feed(observer, layout, mass, [4])
    want = mass[:, :, 7:9].sum(2)  # the line that piece two begins, two tokens of three
    for place in range(9):
        if layout.column(place) >= 2:
            want[..., place] += mass[:, :, 5:7, place].sum(2)  # the short line before it
    torch.testing.assert_close(observer.mass_at(layout, positions, 9), want)


def test_what_a_slot_held_is_forgotten_of_both_lines():
    layout = RasterLayout(rows=3, cols=4)
    observer = RollingMass(shape_of(layout, 8))
    feed(observer, layout, torch.rand(2, 3, 6, 8) + 0.1)
    slots = torch.tensor([1, 3]).expand(2, 3, 2)
    observer.forget(slots)
    read = observer.mass_at(layout, torch.arange(8).expand(2, 3, -1), 6)
    assert read.gather(2, slots).count_nonzero() == 0
    assert (read[..., [0, 2, 4]] > 0).all()


def test_both_lines_go_along_when_a_prompt_is_compressed():
    """What is read of a token that stays is what it would be in a cache that keeps them all."""
    layout = TextLayout(length=40, line_length=4)
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randn(2, 2, 22, 8, generator=draw) for _ in range(3)]
    policy = kvpolicy.create("linear2d", anchors=1, recent=1, parts=2)
    narrow, wide = (PolicyCache(policy, budget, layout=layout, num_layers=1) for budget in (12, 40))
    for cache in (narrow, wide):
        cache.attend(0, *tokens)
    few, many = narrow.layers[0].observers[0].of_lines, wide.layers[0].observers[0].of_lines
    where = narrow.positions(0)  # nothing was evicted there: a token's slot is its position
    assert (where >= 0).all()
    assert where.shape[-1] < 22
    want = many.gather(3, where.unsqueeze(2).expand(-1, -1, 2, -1))
    torch.testing.assert_close(few[..., : where.shape[-1]], want)
    assert (want > 0).any(3).all()


def test_a_padded_token_leaves_the_reading_of_what_it_would_have_replaced():
    layout = TextLayout(length=40, line_length=4)
    draw = torch.Generator().manual_seed(4)
    tokens = [torch.randn(2, 2, 30, 8, generator=draw) for _ in range(3)]
    policy = kvpolicy.create("linear2d", anchors=1, recent=1, parts=2)
    cache = PolicyCache(policy, 12, layout=layout, num_layers=1)
    for token in range(21):
        cache.attend(0, *(each[:, :, token : token + 1] for each in tokens))
    observer = cache.layers[0].observers[0]
    held, read = cache.positions(0)[1].clone(), observer.of_lines[1].clone()
    visible = torch.ones(2, 1, 1, 22, dtype=torch.bool)
    visible[1] = False  # of the second sequence, the token hides even from itself
    cache.attend(0, *(each[:, :, 21:22] for each in tokens), visible=visible)
    assert torch.equal(cache.positions(0)[1], held)
    assert not torch.equal(cache.positions(0)[0], held)
    torch.testing.assert_close(observer.of_lines[1], read)
