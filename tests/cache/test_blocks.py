"""Blocks and masks: what a query sees is what the mask says, of what is cached."""

from __future__ import annotations

import math

import pytest
import torch

import kvpolicy
from kvpolicy.cache.blocks import block_ends


def prefix_lm(length: int, prompt: int) -> torch.Tensor:
    """Tokens of the prompt see each other; the others see what came before."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:prompt, :prompt] = True
    return mask[None, None]


def image_inside(length: int, first: int, end: int) -> torch.Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[first:end, first:end] = True
    return mask[None, None]


def test_ends_of_blocks():
    assert block_ends(None, 3, 4) == [1, 2, 3, 4]
    assert block_ends(torch.ones(1, 1, 4, 7, dtype=torch.bool).tril(3), 3, 4) == [1, 2, 3, 4]
    assert block_ends(prefix_lm(6, 4), 0, 6) == [4, 4, 4, 4, 5, 6]
    assert block_ends(image_inside(8, 2, 5), 0, 8) == [1, 2, 5, 5, 5, 6, 7, 8]
    # The second half of it alone, behind tokens that are cached.
    assert block_ends(image_inside(8, 4, 7)[:, :, 3:], 3, 5) == [1, 4, 4, 4, 5]
    # Chains: 0 sees 2, 1 sees 3, so all four are one block.
    chain = torch.eye(5, dtype=torch.bool)
    chain[0, 2] = chain[1, 3] = True
    assert block_ends(chain[None, None], 0, 5) == [4, 4, 4, 4, 5]
    # One sequence of the batch, or one head, is enough.
    mixed = torch.ones(2, 2, 3, 3, dtype=torch.bool).tril()
    mixed[1, 1, 0, 2] = True
    assert block_ends(mixed, 0, 3) == [3, 3, 3]


def test_a_token_that_sees_nothing_is_a_block_of_its_own():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., 1, :] = False
    assert block_ends(mask, 0, 4) == [1, 2, 3, 4]


def by_the_book(query, key, value, visible):
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, dim=1) for t in (key, value))
    scores = query.double() @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).float()


MASKS = {
    "prefix-LM": prefix_lm(40, 25),
    "an image in the prompt": image_inside(40, 7, 31),
    "all see all": torch.ones(1, 1, 40, 40, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("policy", ["full", "h2o", "streaming_llm"])
@pytest.mark.parametrize(
    "layout",
    [
        kvpolicy.TextLayout(sinks=2, length=60),
        kvpolicy.RasterLayout(rows=6, cols=8, prefix=2),
        kvpolicy.AfterPrompt(kvpolicy.RasterLayout(rows=6, cols=8)),
    ],
    ids=["text", "image", "late"],
)
def test_at_full_budget_the_output_is_that_of_the_mask(policy, layout, mask):
    """Today's bug: a causal triangle was put over whatever the model's mask said."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 2, 40, 8)
    cache = kvpolicy.PolicyCache(policy, "1/1", layout=layout, num_layers=1)
    output = cache.attend(0, query, key, value, visible=MASKS[mask])
    expected = by_the_book(query, key, value, MASKS[mask])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    causal = by_the_book(query, key, value, torch.ones(40, 40, dtype=torch.bool).tril())
    assert (expected - causal).abs().max() > 0.1


def test_a_prompt_longer_than_the_slots_sees_what_its_mask_says():
    """It attends in full, in chunks of queries that cut a block, and is compressed afterwards."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 2, 300, 8), torch.randn(2, 1, 1, 300, 8)
    mask = image_inside(300, 100, 280)
    cache = kvpolicy.PolicyCache("h2o", 20, layout=kvpolicy.TextLayout(sinks=2), num_layers=1)
    output = cache.attend(0, query, key, value, visible=mask)
    torch.testing.assert_close(output, by_the_book(query, key, value, mask), atol=1e-5, rtol=1e-5)
    # What the queries gave is what the observer got, whatever the chunks.
    shares = (query.double() @ key.double().transpose(2, 3) / math.sqrt(8)).masked_fill(
        ~mask, -torch.inf
    )
    mass = shares.softmax(-1).mean(1)[0].sum(0).float()
    held = cache.positions(0)[0, 0]
    got = cache.layers[0].observers[0].mass[0, 0]
    torch.testing.assert_close(got, mass[held], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["h2o", "streaming_llm", "knorm", "random"])
def test_a_block_that_evicts_is_written_together(policy):
    """Behind a full cache: all its tokens are held, see each other, and not what they replaced."""
    torch.manual_seed(0)
    layout = kvpolicy.TextLayout(sinks=1)
    query, (key, value) = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 2, 30, 8)
    cache = kvpolicy.PolicyCache(policy, 16, layout=layout, num_layers=1)
    for token in range(24):
        part = slice(token, token + 1)
        cache.attend(0, query[:, :, part], key[:, :, part], value[:, :, part])
    before = cache.positions(0)
    part = slice(24, 29)
    visible = torch.ones(1, 1, 5, 29, dtype=torch.bool)
    output = cache.attend(0, query[:, :, part], key[:, :, part], value[:, :, part], visible=visible)
    after = cache.positions(0)
    for new in range(24, 29):
        assert ((after == new).sum(-1) == 1).all()
    gone = (before.unsqueeze(-1) != after.unsqueeze(-2)).all(-1)
    assert (gone.sum(-1) == 5).all()
    held = torch.zeros(2, 2, 30, dtype=torch.bool).scatter_(2, after, True)
    seen = held.repeat_interleave(2, dim=1).unsqueeze(2)
    expected = by_the_book(query[:, :, part], key, value, seen)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert cache.stats().peak_tokens == (17,)


def test_a_block_that_finds_no_room_is_refused_by_name():
    layout = kvpolicy.TextLayout(sinks=1)
    for budget, size, words in ((8, 9, "9 tokens from position 12"), (8, 6, "6 tokens")):
        cache = kvpolicy.PolicyCache(
            kvpolicy.create("streaming_llm", sinks=3), budget, layout=layout, num_layers=1
        )
        for _ in range(12):
            cache.attend(0, *torch.randn(3, 1, 1, 1, 4))
        visible = torch.ones(1, 1, size, 12 + size, dtype=torch.bool)
        with pytest.raises(kvpolicy.BudgetError, match=rf"{words}.*see each other.*larger budget"):
            cache.attend(0, *torch.randn(3, 1, 1, size, 4), visible=visible)
        # Nothing has changed: smaller ones go on.
        cache.attend(0, *torch.randn(3, 1, 1, 1, 4))
        assert cache.seen == 13


def test_a_row_for_all_queries_is_no_mask():
    """It would say that all new tokens see each other; who means padding says causality, too."""
    cache = kvpolicy.PolicyCache("full", layout=kvpolicy.TextLayout(length=8), num_layers=1)
    with pytest.raises(kvpolicy.ShapeError, match=r"visible is .*\[1, 1, 1, 4\].*causality"):
        cache.attend(
            0, *torch.randn(3, 1, 1, 4, 4), visible=torch.ones(1, 1, 1, 4, dtype=torch.bool)
        )


# -- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["h2o", "streaming_llm", "tova", "snapkv"])
@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_padding_anywhere_holds_no_slot_that_a_live_token_could_have(policy, chunk):
    torch.manual_seed(0)
    made = kvpolicy.create(policy, **({"window": 2, "interval": 2} if policy == "snapkv" else {}))
    layout, budget, length = kvpolicy.TextLayout(sinks=1), 9, 24
    dead = torch.zeros(2, length, dtype=torch.bool)
    dead[0, [0, 1, 5, 6, 7, 15]] = True  # before, inside, and late
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril() & ~dead[:, None, None]
    query, (key, value) = torch.randn(2, 4, length, 8), torch.randn(2, 2, 2, length, 8)
    cache = kvpolicy.PolicyCache(made, budget, layout=layout, num_layers=1)
    for first in range(0, length, chunk):
        part = slice(first, first + chunk)
        end = min(first + chunk, length)
        cache.attend(
            0,
            query[:, :, part],
            key[:, :, part],
            value[:, :, part],
            visible=mask[:, :, part, :end],
        )
        held = cache.positions(0)
        live = (~dead[:, :end]).sum(-1)
        for row in range(2):
            here = held[row][held[row] >= 0]
            assert not dead[row, here].any()
            count = (held[row] >= 0).sum(-1)
            # A decision for several tokens may leave slots free; else all that live are held.
            spare = 1 if policy == "snapkv" else 0
            assert (count >= min(int(live[row]), 1 + budget) - spare).all(), (row, end, held[row])


def test_padding_at_the_end_of_prompts_is_no_ones():
    """Right padding: what comes next sees the prompt's real tokens alone."""
    torch.manual_seed(0)
    layout = kvpolicy.TextLayout(sinks=1)
    query, (key, value) = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 2, 9, 8)
    dead = torch.zeros(2, 9, dtype=torch.bool)
    dead[0, 5:8] = True
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() & ~dead[:, None, None]
    cache = kvpolicy.PolicyCache("h2o", 12, layout=layout, num_layers=1)
    cache.attend(0, query[:, :, :8], key[:, :, :8], value[:, :, :8], visible=mask[:, :, :8, :8])
    out = cache.attend(0, query[:, :, 8:], key[:, :, 8:], value[:, :, 8:], visible=mask[:, :, 8:])
    expected = by_the_book(query[:, :, 8:], key, value, mask[:, :, 8:])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (cache.positions(0)[0] >= 0).sum(-1).tolist() == [6, 6]
