"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvpolicy.layout import TokenLayout
from kvpolicy.policy import CacheView, ScoredPolicy
from kvpolicy.registry import register

__all__ = ["StreamingLLM"]


@register("streaming_llm", paper="arXiv:2309.17453")
class StreamingLLM(ScoredPolicy):
    """Keep attention sinks and the most recent tokens.

    ``score(j) = j`` behind the sinks (Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", arXiv:2309.17453, section 3.2). Nothing is observed. The sinks count in
    addition to the layout's pinned prefix.
    """

    sinks: int = Field(4, ge=0, description="first tokens behind the prefix that are never evicted")

    def min_budget(self, layout: TokenLayout) -> int:
        """The sinks and one recent token."""
        return self.sinks + 1

    def protect(self, view: CacheView) -> Tensor:
        """The sinks."""
        return view.index < self.sinks

    def score(self, view: CacheView) -> Tensor:
        """The more recent, the better."""
        return -view.age
