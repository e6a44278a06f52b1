"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field

from kvpolicy.parts import Anchors, Recency
from kvpolicy.policy.parts import Parts
from kvpolicy.policy.policy import ScoredPolicy
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

    @cached_property
    def parts(self) -> Parts:
        """Sinks; recency; every token."""
        return Parts(protect=(Anchors(count=self.sinks),), score=Recency())
