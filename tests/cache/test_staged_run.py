"""Staged tokens that attend together: what stays is what would have come one by one, but for
rounding."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.turns import in_turn

import kvpolicy

RASTER = kvpolicy.RasterLayout(rows=6, cols=5, prefix=2)
TEXT = kvpolicy.TextLayout(sinks=2, length=32)
HEADS, GROUP, DIM = 2, 2, 8


def tokens(count, seed=0):
    chance = torch.Generator().manual_seed(seed)
    query = torch.randn(2, HEADS * GROUP, count, DIM, generator=chance)
    return query, *torch.randn(2, 2, HEADS, count, DIM, generator=chance)


def fed(cache, tensors, first, last, **options):
    return torch.cat(
        [
            torch.stack(
                [cache.attend(layer, *(t[:, :, i : i + 1] for t in tensors)) for layer in range(2)]
            )
            for i in range(first, last)
        ],
        dim=3,
    )


def make(name, layout, reclaim="lazy"):
    budget = None if name == "full" else 14
    policy = tiny_models.policy(name)
    return kvpolicy.PolicyCache(policy, budget, layout=layout, num_layers=2, reclaim=reclaim)


@pytest.mark.parametrize(
    ("name", "where", "reclaim"),
    in_turn(kvpolicy.available(), ["raster", "text"], turn=["lazy", "eager"]),
)
def test_what_stays_is_what_would_have_come_alone(name, where, reclaim):
    layout = {"raster": RASTER, "text": TEXT}[where]
    length = 32
    tensors = tokens(length)
    wrong = tokens(length, seed=1)
    alone, staged = make(name, layout, reclaim), make(name, layout, reclaim)
    expected = fed(alone, tensors, 0, length)
    seen, given = 3, [fed(staged, tensors, 0, 3)]
    with staged.stage(lookahead=12, together=True):
        turn = 0
        while seen < length - 1:
            window = min(12, length - seen)
            keep = min((1, 7, 4, 12, 2, 9)[turn % 6], window)
            # What does not stay is another token than what comes in its place.
            now = [
                torch.cat([a[:, :, seen : seen + keep], b[:, :, : window - keep]], dim=2)
                for a, b in zip(tensors, wrong, strict=True)
            ]
            output = torch.stack([staged.attend(layer, *now) for layer in range(2)])
            staged.commit(keep)
            given.append(output[:, :, :, :keep])
            seen, turn = seen + keep, turn + 1
    given.append(fed(staged, tensors, seen, length)) if seen < length else None
    torch.testing.assert_close(torch.cat(given, dim=3), expected, rtol=1e-4, atol=1e-5)
    for layer in range(2):
        assert torch.equal(staged.positions(layer), alone.positions(layer))
        for one, other in zip(
            staged.layers[layer].observers, alone.layers[layer].observers, strict=True
        ):
            torch.testing.assert_close(one.mass, other.mass, rtol=1e-4, atol=1e-5)


def test_they_do_attend_together(monkeypatch):
    """One product for all of them: that is what it is for."""
    from kvpolicy.cache import staged_run

    runs = []

    def counted(*arguments):
        runs.append(arguments[2].shape[2])
        return honest(*arguments)

    honest = staged_run._together
    monkeypatch.setattr(staged_run, "_together", counted)
    cache, tensors = make("linear", RASTER), tokens(32)
    fed(cache, tensors, 0, 19)
    with cache.stage(lookahead=8, together=True):
        cache.attend(0, *(t[:, :, 19:27] for t in tensors))
    assert runs == [3, 5]  # a line ends at 22
    with cache.stage(lookahead=8):
        cache.attend(0, *(t[:, :, 19:27] for t in tensors))
    assert runs == [3, 5]


def test_a_mask_that_hides_tokens_is_kept():
    """Under a window, which the model's mask imposes, staged tokens see what they would alone."""
    tensors, length = tokens(20), 20
    alone = kvpolicy.PolicyCache("h2o", 12, layout=TEXT, num_layers=1, windows=[16])
    staged = kvpolicy.PolicyCache("h2o", 12, layout=TEXT, num_layers=1, windows=[16])

    def mask(first, last):
        queries, keys = torch.arange(first, last)[:, None], torch.arange(last)
        return ((keys <= queries) & (keys > queries - 6))[None, None]

    expected = [
        alone.attend(0, *(t[:, :, i : i + 1] for t in tensors), visible=mask(i, i + 1))
        for i in range(length)
    ]
    given = [
        staged.attend(0, *(t[:, :, i : i + 1] for t in tensors), visible=mask(i, i + 1))
        for i in range(4)
    ]
    with staged.stage(lookahead=8, together=True):
        for first in range(4, length, 4):
            last = min(first + 8, length)
            now = [t[:, :, first:last] for t in tensors]
            given.append(staged.attend(0, *now, visible=mask(first, last))[:, :, :4])
            staged.commit(4)
    torch.testing.assert_close(
        torch.cat(given, dim=2), torch.cat(expected, dim=2), rtol=1e-4, atol=1e-5
    )


def test_keys_of_one_length_go_in_the_same_order_however_they_come():
    """``knorm``, whose every score is one of a few: ties fall by position, together or alone."""
    query, key, value = tokens(32)
    key = torch.nn.functional.one_hot(key.argmax(-1), DIM) * (1.0 + (torch.arange(32) % 2))[:, None]
    alone, staged = make("knorm", TEXT), make("knorm", TEXT)
    fed(alone, (query, key, value), 0, 28)
    fed(staged, (query, key, value), 0, 4)
    with staged.stage(lookahead=12, together=True):
        for kept in (12, 3, 9):
            now = [t[:, :, staged.seen : staged.seen + 12] for t in (query, key, value)]
            count = min(12, now[0].shape[2])
            for layer in range(2):
                staged.attend(layer, *(t[:, :, :count] for t in now))
            staged.commit(kept)
    for layer in range(2):
        assert torch.equal(staged.positions(layer), alone.positions(layer))
