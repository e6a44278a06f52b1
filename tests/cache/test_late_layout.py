"""Layouts that are known only once the first tokens are out, and sequences of several pieces."""

from __future__ import annotations

import pytest
import torch
from support.turns import in_turn

import kvpolicy

GRID = kvpolicy.RasterLayout(rows=5, cols=4, line_break=1, suffix=2)
PROMPT = 7
KNOWN = GRID.model_copy(update={"prefix": PROMPT})
SMALL = {
    "linear": {"anchors": 3},
    "linear2d": {"anchors": 3},
    "pyramid": {"window": 2, "interval": 3},
    "snapkv": {"window": 2, "interval": 3},
    "rkv": {"window": 2, "interval": 3},
    "ssd": {"window": 3},
}
EVICTING = sorted(set(kvpolicy.available()) - {"full"})


class AtLast:
    """Says nothing until ``when`` tokens are cached, then the layouts given for each position."""

    def __init__(self, layout: kvpolicy.TokenLayout, when: int, then: dict | None = None):
        self.layout, self.when, self.then = layout, when, then or {}
        self.goes_on = bool(then)

    def preview(self):
        return None

    def at(self, seen, count, bound):
        if seen < self.when:
            return None
        for start, layout in self.then.items():
            if seen >= start:
                bound = layout
        return self.layout if bound is None else bound


def policy(name: str) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create(name, **SMALL.get(name, {}))


def stream(tokens: int, batch=2, heads=2, group=2, dim=8, seed=3):
    chance = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(batch, heads * group, tokens, dim, generator=chance)
    key = torch.randn(batch, heads, tokens, dim, generator=chance)
    return query, key, torch.randn(batch, heads, tokens, dim, generator=chance)


def run(cache: kvpolicy.PolicyCache, tensors, sizes):
    """Outputs, and what each layer holds after each call."""
    outputs, held = [], []
    for parts in zip(*(tensor.split(sizes, dim=2) for tensor in tensors), strict=True):
        outputs.append(torch.stack([cache.attend(n, *parts) for n in range(len(cache.layers))]))
        held.append([cache.positions(n).sort().values for n in range(len(cache.layers))])
    return torch.cat(outputs, dim=3), held


def make(name: str, layout, budget: object = "3/4", **options) -> kvpolicy.PolicyCache:
    return kvpolicy.PolicyCache(policy(name), budget, layout=layout, num_layers=2, **options)


#: A layout, and the calls that bring the prompt.
LATE = {
    "after-prompt": (kvpolicy.AfterPrompt(GRID), [PROMPT]),
    "at-its-end": (AtLast(KNOWN, PROMPT), [PROMPT]),
    "in-pieces": (AtLast(KNOWN, 4), [2, 2, 3]),
    "token-by-token": (AtLast(KNOWN, 3), [1, 1, 1, 1, 1, 1, 1]),
    "at-once": (AtLast(KNOWN, 0), [PROMPT]),
}


@pytest.mark.parametrize(
    ("name", "when", "reclaim"), in_turn(EVICTING, LATE, turn=["lazy", "eager"])
)
def test_bound_late_equals_known_beforehand(name, when, reclaim):
    """Not just within the budget: the same tokens are kept, and the outputs agree."""
    layout, first = LATE[when]
    tensors = stream(KNOWN.length)
    rest = [1] * (KNOWN.length - PROMPT)
    late = make(name, layout, reclaim=reclaim)
    outputs, held = run(late, tensors, first + rest)
    expected, known = run(make(name, KNOWN, reclaim=reclaim), tensors, [PROMPT, *rest])
    torch.testing.assert_close(outputs, expected, atol=2e-5, rtol=0)
    for mine, theirs in zip(held[len(first) - 1 :], known, strict=True):
        for layer, positions in enumerate(theirs):
            # Before it is bound a cache has no free slots, which the other holds as empty ones.
            cut = mine[layer].shape[-1]
            assert torch.equal(mine[layer], positions[..., -cut:])
    assert late.layout == KNOWN
    assert max(late.stats().evictions) > 0
    assert sum(late.stats().budgets) == 2 * int(0.75 * GRID.length)
    for layer, budget in enumerate(late.stats().budgets):
        assert late.stats().peak_tokens[layer] <= PROMPT + budget


def test_until_it_is_bound_everything_is_prefix():
    cache = make("h2o", AtLast(KNOWN, PROMPT))
    assert cache.layout is None
    tensors = stream(PROMPT)
    outputs, _ = run(cache, tensors, [3, 1, 1, 2])
    assert torch.equal(cache.positions(1), torch.arange(PROMPT).expand(2, 2, PROMPT))
    assert cache.stats().budgets == (0, 0)
    assert cache.stats().evictions == (0, 0)
    assert cache.stats().peak_tokens == (PROMPT, PROMPT)
    full = make("h2o", KNOWN, budget=None)
    torch.testing.assert_close(outputs, run(full, tensors, [PROMPT])[0], atol=1e-5, rtol=0)


def test_a_long_unbound_prompt_attends_in_chunks_and_respects_what_is_hidden():
    tensors = stream(300, heads=1)
    hidden = torch.ones(2, 1, 300, 300, dtype=torch.bool).tril()
    hidden[0, ..., :40] = False
    outputs = []
    for layout in (AtLast(KNOWN, 400), kvpolicy.RasterLayout(rows=1, cols=300)):
        cache = kvpolicy.PolicyCache("full", layout=layout, num_layers=1)
        parts = [
            cache.attend(0, *(t[:, :, :200] for t in tensors), visible=hidden[:, :, :200, :200]),
            cache.attend(0, *(t[:, :, 200:] for t in tensors), visible=hidden[:, :, 200:]),
        ]
        outputs.append(torch.cat(parts, dim=2)[:, :, 40:])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_a_reset_cache_is_bound_anew():
    cache = make("linear", kvpolicy.AfterPrompt(GRID))
    run(cache, stream(KNOWN.length), [PROMPT] + [1] * GRID.length)
    cache.reset()
    assert cache.layout is None
    run(cache, stream(4), [4])
    assert cache.layout == GRID.model_copy(update={"prefix": 4})
    assert cache.layers[0].capacity == 4 + cache.layers[0].budget


def test_beams_are_followed_while_unbound():
    tensors = stream(PROMPT + 4)
    order = torch.tensor([1, 1])
    outputs = []
    for early in (True, False):
        cache = make("h2o", AtLast(KNOWN, PROMPT))
        first = [t[:, :, :5] if early else t[order, :, :5] for t in tensors]
        run(cache, first, [5])
        if early:
            cache.select_batch(order)
        outputs.append(run(cache, [t[order, :, 5:] for t in tensors], [1] * 6)[0])
    assert torch.equal(*outputs)


def test_a_budget_that_is_too_small_names_layout_and_smallest_budget():
    words = r"too few for linear on RasterLayout\(rows=5.*smallest budget that works is 13"
    with pytest.raises(kvpolicy.BudgetError, match=words):
        make("linear", kvpolicy.AfterPrompt(GRID), budget="12")  # before the first token
    cache = make("linear", AtLast(KNOWN, PROMPT), budget="12")
    run(cache, stream(PROMPT), [PROMPT])
    with pytest.raises(kvpolicy.BudgetError, match=words):
        run(cache, stream(1), [1])


@pytest.mark.parametrize("budget", ["none of them", 0, -3, 1.5])
def test_what_is_no_budget_is_refused_at_once(budget):
    with pytest.raises(kvpolicy.BudgetError):
        make("h2o", AtLast(KNOWN, PROMPT), budget=budget)


def test_a_layout_that_comes_too_late_is_refused():
    cache = make("h2o", AtLast(KNOWN, PROMPT + 1))
    run(cache, stream(PROMPT + 1), [PROMPT + 1])
    with pytest.raises(kvpolicy.LayoutError, match="came after 8 tokens, but its prefix has 7"):
        run(cache, stream(1), [1])


def test_more_tokens_than_the_late_layout_has_are_refused():
    cache = make("h2o", kvpolicy.AfterPrompt(GRID))
    run(cache, stream(PROMPT), [PROMPT])
    with pytest.raises(kvpolicy.LayoutError, match="is outside"):
        run(cache, stream(GRID.length + 1), [GRID.length + 1])


@pytest.mark.parametrize("wrong", [None, "raster", object(), 12, kvpolicy.AfterPrompt])
def test_what_is_no_layout_is_refused(wrong):
    with pytest.raises(kvpolicy.ParameterError, match="is not a TokenLayout"):
        make("h2o", wrong)


# -- several pieces --------------------------------------------------------------------------------

END = KNOWN.length
PIECES = kvpolicy.SequenceLayout(prefix=PROMPT, pieces=((PROMPT, 5), (END + 3, 5), (END + 6, 4)))


def test_arithmetic_of_pieces():
    lines, columns = [], []
    line = column = 0
    starts = dict(PIECES.pieces)
    width = 5
    for position in range(PROMPT, END + 30):
        if position in starts:
            line += column > 0 and position > PROMPT
            column, width = 0, starts[position]
        lines.append(line)
        columns.append(column)
        column += 1
        if column == width:
            line, column = line + 1, 0
    positions = torch.arange(PROMPT, END + 30, dtype=torch.int32)
    assert PIECES.line(positions).tolist() == lines
    assert PIECES.column(positions).tolist() == columns
    assert [PIECES.line(int(p)) for p in positions] == lines
    assert [PIECES.column(int(p)) for p in positions] == columns
    assert [PIECES.is_line_start(int(p)) for p in positions] == [c == 0 for c in columns]
    assert not any(PIECES.is_line_start(p) for p in range(PROMPT))
    assert (PIECES.line(torch.arange(PROMPT)) < 0).all()
    assert PIECES.is_pinned(torch.arange(-1, PROMPT + 1)).tolist() == [False, *[True] * 7, False]
    assert (PIECES.length, PIECES.evictable, PIECES.line_length) == (None, None, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix": 3, "pieces": ()},
        {"prefix": 3, "pieces": ((4, 5),)},
        {"prefix": 3, "pieces": ((3, 0),)},
        {"prefix": 3, "pieces": ((3, 5), (3, 5))},
        {"prefix": 3, "pieces": ((3, 5), (9, 5), (8, 5))},
        {"prefix": -1, "pieces": ((-1, 5),)},
        {"pieces": ((0, 5),)},
    ],
)
def test_pieces_that_do_not_follow_each_other_are_refused(fields):
    with pytest.raises(kvpolicy.KVPolicyError, match="SequenceLayout"):
        kvpolicy.SequenceLayout(**fields)


@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
@pytest.mark.parametrize("name", EVICTING)
def test_the_budget_holds_while_the_sequence_goes_on(name, reclaim):
    """An image, text, and a further image: at no token more than prefix and budget."""
    tokens = END + 6 + 5 * 4
    layout = AtLast(KNOWN, PROMPT, {END: PIECES})
    cache = make(name, layout, budget=15, reclaim=reclaim)
    _, held = run(cache, stream(tokens), [PROMPT] + [1] * (tokens - PROMPT))
    assert cache.layout == PIECES
    for seen, layers in enumerate(held, start=PROMPT):
        for layer, budget in enumerate(cache.stats().budgets):
            present = layers[layer] >= 0
            assert present.sum(-1).max() <= PROMPT + budget
            assert (layers[layer] == seen - 1).any(-1).all()
            pinned = (layers[layer] < PROMPT) & present
            assert (pinned.sum(-1) == min(PROMPT, seen)).all()
            if name == "linear":
                # The current line, and the one before it, wherever pieces begin.
                near = [
                    p for p in range(PROMPT, seen) if PIECES.line(p) >= PIECES.line(seen - 1) - 1
                ]
                for position in near:
                    assert (layers[layer] == position).any(-1).all(), (seen, position)
    assert cache.stats().peak_tokens == tuple(PROMPT + b for b in cache.stats().budgets)


def test_what_was_foreseen_under_another_layout_is_forgotten(monkeypatch):
    """A piece that begins in mid-line decides where its own lines begin."""
    decided = []
    real = type(policy("linear")).victims

    def victims(self, view, count):
        decided.append((view.seen, count))
        return real(self, view, count)

    monkeypatch.setattr(type(policy("linear")), "victims", victims)
    first = kvpolicy.SequenceLayout(prefix=2, pieces=((2, 4),))
    then = kvpolicy.SequenceLayout(prefix=2, pieces=((2, 4), (16, 6)))
    cache = kvpolicy.PolicyCache(
        kvpolicy.create("linear", anchors=0, recent_lines=0),
        8,
        layout=AtLast(first, 2, {16: then}),
        num_layers=1,
    )
    run(cache, stream(22), [2] + [1] * 20)
    # Ten slots: lines of 4 begin at 2, 6, 10 and 14, of which two need room; then one of 6 at 16,
    # where two slots of the line before are still free.
    assert decided == [(10, 4), (14, 4), (16, 6)]


def test_a_further_image_that_needs_a_larger_budget_is_refused():
    wide = kvpolicy.SequenceLayout(prefix=PROMPT, pieces=((PROMPT, 5), (END, 12)))
    cache = make("linear", AtLast(KNOWN, PROMPT, {END: wide}), budget=15)
    run(cache, stream(END), [PROMPT] + [1] * GRID.length)
    with pytest.raises(kvpolicy.BudgetError, match=r"budget of 15 .* smallest .* works is 27"):
        run(cache, stream(1), [1])


def test_a_prefix_can_not_grow_once_slots_are_allocated():
    other = kvpolicy.SequenceLayout(prefix=PROMPT + 1, pieces=((PROMPT + 1, 5),))
    cache = make("h2o", AtLast(KNOWN, PROMPT, {END: other}))
    run(cache, stream(END), [PROMPT] + [1] * GRID.length)
    with pytest.raises(kvpolicy.LayoutError, match="allocated for 7 pinned tokens"):
        run(cache, stream(1), [1])


def test_a_budget_in_tokens_may_be_larger_than_the_first_image():
    """Where the sequence goes on, everything fits if the budget says so."""
    tokens = END + 6 + 5 * 4
    tensors = stream(tokens)
    sizes = [PROMPT] + [1] * (tokens - PROMPT)
    cache = make("linear", AtLast(KNOWN, PROMPT, {END: PIECES}), budget=tokens - PROMPT)
    outputs, _ = run(cache, tensors, sizes)
    assert cache.stats().evictions == (0, 0)
    everything = make("full", kvpolicy.RasterLayout(rows=1, cols=tokens), budget=None)
    torch.testing.assert_close(outputs, run(everything, tensors, sizes)[0], atol=1e-5, rtol=0)
    closed = make("linear", AtLast(KNOWN, PROMPT), budget=tokens)
    run(closed, stream(PROMPT + 1), [PROMPT, 1])
    assert closed.stats().budgets == (GRID.length, GRID.length)


def test_everything_is_everything_that_is_known():
    """Where layers share a budget unevenly, 1/1 of the first image is that, in every layer."""
    for budget in ("1/1", None):
        cache = make("pyramid", AtLast(KNOWN, PROMPT, {END: PIECES}), budget=budget)
        run(cache, stream(END), [PROMPT] + [1] * GRID.length)
        assert cache.stats().budgets == (GRID.length, GRID.length)
