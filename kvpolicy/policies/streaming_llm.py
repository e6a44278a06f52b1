"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvpolicy.budget.span import Span
from kvpolicy.parts import anchors
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register

__all__ = ["StreamingLLM"]


@register("streaming_llm", paper="arXiv:2309.17453")
class StreamingLLM(ScoredPolicy):
    """Keep attention sinks and the most recent tokens.

    ``score(j) = j`` behind the sinks (Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", arXiv:2309.17453, section 3.2). Nothing is observed. The sinks count in
    addition to the layout's pinned prefix; four of them is the paper's number, not a grid's.
    """

    sinks: Span = Field(
        4, description="first tokens behind the prefix that are never evicted, or lines of them"
    )

    def protect(self, view: CacheView) -> Tensor:
        """The first ``sinks`` tokens stay."""
        return anchors(view, self.sinks)

    def score(self, view: CacheView) -> Tensor:
        """The position: of the rest, the newest stay."""
        return view.positions
