"""What a policy claims: the anchors and lines that it never gives up, and that it decides by line.

``linear``, ``linear2d`` and ``streaming_llm`` claim it by their parameters, so that a subclass
whose ``protect`` falls short of them is caught. Any other policy, and of ``linear2d`` what is
recent, claims what its ``protect`` says of views far into a sequence, where no token is both old
and new.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from kvpolicy.budget.span import first_tokens
from kvpolicy.layout import RasterLayout, TokenLayout
from kvpolicy.observers import LineMass
from kvpolicy.policies import Linear, Linear2D, StreamingLLM
from kvpolicy.policy.policy import EvictionPolicy, ScoredPolicy
from kvpolicy.policy.probe import Unread, far_line, probe_view
from kvpolicy.slots import SlotShape

__all__ = ["anchors_of", "is_line_by_line", "lines_kept"]

#: Where a policy is asked whether it decides line by line.
_GRID = RasterLayout(rows=64, cols=5, prefix=2)
#: How many tokens lie behind the prefix where ``protect`` is asked.
_FAR = (2000, 2500)
#: What is a share of a budget is protected with the larger ones, too.
_BUDGET = 1


def anchors_of(policy: EvictionPolicy, layout: TokenLayout) -> int:
    """How many tokens behind the prefix are never evicted."""
    if isinstance(policy, Linear | Linear2D):
        return first_tokens(policy.anchors, layout)
    if isinstance(policy, StreamingLLM):
        return first_tokens(policy.sinks, layout)
    counts = {_leading(kept) for kept in _protected(policy, layout)}
    # What differs from place to place is no set of anchors.
    return counts.pop() if len(counts) == 1 else 0


def lines_kept(policy: EvictionPolicy, layout: TokenLayout) -> int:
    """How many finished lines are kept whole beside the current one; -1 if not even that is."""
    if isinstance(policy, Linear):
        return policy.recent_lines
    newest = [_leading(kept.flip(-1)) for kept in _protected(policy, layout)]
    # The next token is its line's last: the others of the line are the newest tokens.
    others = layout.line_length - 1
    return min(((count - others) // layout.line_length for count in newest), default=-1)


def is_line_by_line(policy: EvictionPolicy) -> bool:
    """Whether a policy decides once a line, by what the last line looked at, and keeps lines."""
    if isinstance(policy, Linear):
        return True
    if not isinstance(policy, ScoredPolicy):
        return False
    shape = SlotShape(1, 1, 1, torch.device("cpu"), _GRID)
    watches = any(isinstance(observer, LineMass) for observer in policy.observers(shape))
    return watches and _decides_by_line(policy) and lines_kept(policy, _GRID) >= 0


def _decides_by_line(policy: ScoredPolicy) -> bool:
    """Whether a line's room is wanted where one begins, and none but the next token's within it."""
    start = far_line(_GRID, _FAR[0])
    with suppress(Unread):
        wanted = [
            policy.headroom(probe_view(_GRID, start + column, _BUDGET))
            for column in range(_GRID.line_length)
        ]
        return wanted == [_GRID.line_length] + [1] * (_GRID.line_length - 1)
    return False


def _protected(policy: EvictionPolicy, layout: TokenLayout) -> Iterator[Tensor]:
    """What is protected of the tokens behind the prefix, before the last token of some line."""
    if not isinstance(policy, ScoredPolicy):
        return
    with suppress(Unread):
        for tokens in _FAR:
            last = far_line(layout, tokens) + layout.line_length - 1
            view = probe_view(layout, last, _BUDGET)
            protected = policy.protect(view)
            if protected is not None:
                yield protected.expand_as(view.positions)[0, 0, layout.prefix :]


def _leading(kept: Tensor) -> int:
    """How many tokens are kept before the first that is not."""
    return int(kept.to(torch.int64).cumprod(-1).sum())
