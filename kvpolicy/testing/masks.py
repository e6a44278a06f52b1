"""The invariant of masks: what a query sees is what the model's mask says, of what is cached."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpolicy.testing.invariants.invariant import Case, fail, register
from kvpolicy.testing.streams import Stream

__all__ = ["drawn_mask"]


def drawn_mask(stream: Stream) -> Tensor:
    """A mask for a stream, bool ``[B, 1, tokens, tokens]``: blocks, holes and padding.

    Within each call some runs of tokens see each other's future; some older tokens are hidden from
    some queries, as in packed sequences and trees; and some tokens are seen by nobody.
    """
    generator = torch.Generator().manual_seed(stream.seed)

    def chance(*size: int, of: float) -> Tensor:
        return torch.rand(size, generator=generator) < of

    tokens = stream.tokens
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = mask & ~chance(tokens, tokens, of=0.2)
    first = 0
    for size in stream.sizes():
        start = first
        while start < first + size:
            length = int(torch.randint(1, 5, (), generator=generator))
            end = min(start + length, first + size)
            mask[start:end, start:end] = True
            start = end
        first += size
    visible = mask.expand(stream.batch, 1, tokens, tokens).clone()
    visible.diagonal(dim1=2, dim2=3).fill_(True)
    padding = chance(stream.batch, 1, 1, tokens, of=0.2)
    padding[..., -1] = False
    return visible & ~padding


@register("masks", "with budget for everything, attention is what the model's own mask says.")
def _masks(case: Case) -> None:
    stream, tokens = case.stream, case.trace.tokens
    visible = drawn_mask(stream)
    # Room for everything, also where padding holds slots: nothing may have to go.
    cache = stream.cache(case.policy, max(stream.tokens * stream.layers * 8, stream.budget))
    if min(cache.stats().budgets) + stream.layout.prefix < stream.tokens:
        return
    first = 0
    seen = visible.any(-1)[:, 0]  # queries that see nothing give what nobody reads
    for step, size in enumerate(stream.sizes()):
        part = slice(first, first + size)
        first += size
        for layer in range(stream.layers):
            sees = visible[:, :, part, :first]
            output = cache.attend(layer, *tokens.of_layer(layer, part), visible=sees)
            _, keys, values = tokens.of_layer(layer, slice(first))
            expected = _plain(tokens.query[layer, :, :, part], keys, values, sees)
            off = (output.double() - expected).abs() * seen[:, None, part, None]
            close = 1e-4 if output.dtype == torch.float32 else 3e-2
            if off.max() > close * max(1.0, expected.abs().max().item()):
                batch, head = divmod(int(off.flatten(2).amax(-1).argmax()), output.shape[1])
                fail(
                    case.trace,
                    f"under a mask, attention is off by {off.max().item():.2g}",
                    layer=layer,
                    batch=batch,
                    head=head // (output.shape[1] // tokens.key.shape[2]),
                    step=step,
                )


def _plain(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention in float64, by the book."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = query.double() @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num() @ value
