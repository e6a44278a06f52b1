"""A toy model small enough to enumerate, over a cache that evicts, and many draws from it at once.

A table holds what the model says behind every prefix that there is, from one run of the cache over
all of them, token by token. Draws look logits up in it, so that each sequence keeps its own count
of tokens a pass, as a batch of one does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import kvpolicy
from kvpolicy import Sampling
from kvpolicy.decoding.sampling import draw
from kvpolicy.decoding.speculative import Drafts, SpeculativeJacobi

_WIDTH, _HEADS, _LAYERS = 8, 2, 2


class ToyModel:
    """Two layers of attention, random weights; tokens 0 to V - 1, and V and V + 1 as prompts."""

    def __init__(self, vocabulary: int, length: int, seed: int = 0) -> None:
        chance = torch.Generator().manual_seed(seed)

        def weight(*size: int) -> Tensor:
            return torch.randn(*size, generator=chance)

        self.vocabulary = vocabulary
        self.embedding = weight(vocabulary + 2, _WIDTH)
        self.places = weight(length, _WIDTH)
        self.layers = [weight(3, _WIDTH, _WIDTH) for _ in range(_LAYERS)]
        self.head = weight(_WIDTH, vocabulary) / 3

    def step(self, cache) -> kvpolicy.Step:
        """A step function over a cache."""

        def run(tokens: Tensor) -> Tensor:
            first, count = cache.seen, tokens.shape[1]
            hidden = self.embedding[tokens] + self.places[first : first + count]
            for layer, weights in enumerate(self.layers):
                query, key, value = (
                    (hidden @ w).unflatten(-1, (_HEADS, -1)).transpose(1, 2) for w in weights
                )
                given = cache.attend(layer, query, key, value).transpose(1, 2).flatten(2)
                hidden = functional.rms_norm(hidden / 2 + given, (_WIDTH,))
            return hidden @ self.head

        return run

    def cache(self, policy, budget, layout) -> kvpolicy.PolicyCache:
        return kvpolicy.PolicyCache(policy, budget, layout=layout, num_layers=_LAYERS)


@dataclass(frozen=True)
class Table:
    """Logits behind every prefix.

    Attributes:
        rows: of each place behind the prompt, ``[V ** place, V]``; a prefix is a number in base V.
        layout: where tokens sit.
    """

    rows: list[Tensor]
    layout: kvpolicy.RasterLayout

    @property
    def count(self) -> int:
        return len(self.rows)

    def logits(self, tokens: Tensor, place: int) -> Tensor:
        """Behind the first ``place`` drawn tokens of ``[B, at least place]``."""
        vocabulary = self.rows[0].shape[-1]
        index = torch.zeros(len(tokens), dtype=torch.int64)
        for drawn in range(place):
            index = index * vocabulary + tokens[:, drawn]
        return self.rows[place][index]

    def joint(self, sampling: Sampling) -> Tensor:
        """The probability of every whole sequence, float64 ``[V ** count]``."""
        joint = torch.ones(1, dtype=torch.float64)
        for rows in self.rows:
            joint = (joint[:, None] * sampling.probabilities(rows).double()).flatten()
        return joint / joint.sum()

    def guided(self, other: Table, scale: float) -> Table:
        """Both halves of guidance, as one."""
        rows = [
            theirs + scale * (mine - theirs)
            for mine, theirs in zip(self.rows, other.rows, strict=True)
        ]
        return Table(rows, self.layout)


def table(model: ToyModel, policy, budget, layout, *, prompt: int = 0) -> Table:
    """Run a cache over every sequence, one token at a time."""
    vocabulary, count = model.vocabulary, layout.length - layout.prefix
    every = torch.cartesian_prod(*[torch.arange(vocabulary)] * count)
    step = model.step(model.cache(policy, budget, layout))
    newest = torch.full((len(every), 1), vocabulary + prompt)
    rows = []
    for place in range(count):
        logits = step(newest)[:, -1]
        rows.append(logits[:: vocabulary ** (count - place)].clone())
        newest = every[:, place : place + 1]
    return Table(rows, layout)


def draw_many(
    decoder: SpeculativeJacobi,
    table: Table,
    draws: int,
    sampling: Sampling,
    seed: int,
    *,
    together: int = 1,
    kind: type[Drafts] = Drafts,
) -> Tensor:
    """Draw by the decoder's own rule: sequences as numbers, int64 ``[draws]``.

    Args:
        decoder: whose window, drafts and rule.
        table: of the model.
        draws: sequences.
        sampling: of tokens.
        seed: of chance.
        together: sequences of a batch, which begin each pass behind the slowest of them.
        kind: of drafts; a test may break some of it.
    """
    chance = torch.Generator().manual_seed(seed)
    prefix, length = table.layout.prefix, table.layout.length
    vocabulary = table.rows[0].shape[-1]
    tokens = torch.zeros(draws, length, dtype=torch.int64)
    chances = sampling.probabilities(table.logits(tokens[:, prefix:], 0))
    tokens[:, prefix] = draw(chances, chance)
    known = torch.full((draws,), prefix + 1)
    window = torch.zeros(draws, decoder.window, vocabulary)
    waiting = defaultdict(list, {(prefix, 0): [(tokens, known, window, chances)]})
    done = []
    while waiting:
        start, begun = min(waiting)
        parts = waiting.pop((start, begun))
        state = [torch.cat(part) for part in zip(*parts, strict=True)]
        if start == length - 1:
            done.append(state[0])
            continue
        drafts = kind(decoder, *state, begun=begun)
        fed = drafts.feed(start, table.layout, chance)
        logits = torch.stack(
            [
                table.logits(drafts.tokens[:, prefix:], start + 1 + i - prefix)
                for i in range(fed.shape[1])
            ],
            dim=1,
        )
        kept = drafts.settle(start, sampling.probabilities(logits), chance)
        kept = kept.view(-1, together).amin(1).repeat_interleave(together)
        for count in kept.unique().tolist():
            rows = kept == count
            state = (drafts.tokens, drafts.known, drafts.chances, drafts.newest)
            waiting[start + count, drafts.begun].append(tuple(part[rows] for part in state))
    drawn = torch.cat(done)[:, prefix:]
    powers = vocabulary ** torch.arange(table.count - 1, -1, -1)
    return (drawn * powers).sum(1)


def chi_square(drawn: Tensor, joint: Tensor) -> float:
    """The chance of such a deviation from the exact probabilities, or a larger one.

    Sequences that are expected fewer than five times are counted together.
    """
    seen = torch.bincount(drawn, minlength=len(joint)).double()
    expected = joint * len(drawn)
    assert not seen[joint == 0].any(), "what can't be drawn, was drawn"
    rare = expected < 5
    if rare.any():
        seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    p = float(torch.special.gammaincc(freedom, statistic / 2))
    assert math.isfinite(p)
    return p
