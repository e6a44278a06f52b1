"""Blocks: which of the new tokens see each other's future, and so must be written together."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_ends"]


def block_ends(visible: Tensor | None, seen: int, count: int) -> list[int]:
    """Where the block of each new token ends.

    A block is a run of new tokens of which none is seen by an earlier token outside of it: an image
    inside a prompt that attends in both directions, a prefix-LM's prompt, a group that is drawn in
    parallel. In causal attention every token is a block of its own.

    Args:
        visible: the mask by position, bool ``[B|1, 1|H, T, seen + T]``; None for a causal one.
        seen: tokens before these.
        count: new tokens T.

    Returns:
        Of each new token, the index behind its block's last one, 1 to T, in order.
    """
    causal = list(range(1, count + 1))
    if visible is None or count == 1:
        return causal
    seen_by_any = visible[..., seen:].flatten(0, 1).any(0)  # [T, T]
    if not bool(seen_by_any.triu(1).any()):
        return causal
    # The last new token that each one sees, itself at least.
    last = count - 1 - seen_by_any.flip(1).to(torch.int8).argmax(1)
    reach = torch.where(seen_by_any.any(1), last, 0).tolist()
    ends, open_since, end = [], 0, 0
    for token in range(count):
        end = max(end, token + 1, reach[token] + 1)
        if token + 1 == end:
            ends += [end] * (end - open_since)
            open_since = end
    return ends
