"""What a policy that breaks its contract is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpolicy.errors import KVPolicyError

if TYPE_CHECKING:
    from kvpolicy.testing.streams import Stream

__all__ = ["PolicyCheckError"]


class PolicyCheckError(KVPolicyError, AssertionError):
    """A policy, or the cache under it, broke an invariant.

    Args:
        invariant: short name of the invariant, e.g. ``pins``.
        words: the invariant in words.
        policy: the policy, as its author would write it.
        stream: the stream that shows it.
        found: what was found, and where: step, layer, head, positions.
        story: what the policy did in the steps before, one line a step.

    Attributes:
        shrunk: whether a smaller stream that shows it was looked for.
    """

    def __init__(
        self, invariant: str, words: str, policy: str, stream: Stream, found: str, story: str = ""
    ) -> None:
        self.invariant = invariant
        self.words = words
        self.policy = policy
        self.stream = stream
        self.found = found
        self.story = story
        self.shrunk = False
        super().__init__(invariant, words, policy, stream, found, story)

    def __str__(self) -> str:
        """All that is known, from what must hold down to how to see it again."""
        size = "smallest stream found" if self.shrunk else "stream"
        parts = [
            f"{self.policy} breaks an invariant.",
            f"Invariant {self.invariant!r}: {self.words}",
            f"Found: {self.found}",
            f"On the {size}: {self.stream.words()}",
        ]
        if self.story:
            parts.append(f"What happened:\n{self.story}")
        parts.append(f"Stream: {self.stream!r}")
        parts.append(
            f"To see it again: from kvpolicy.testing import *; "
            f"INVARIANTS[{self.invariant!r}](Case(policy, stream))"
        )
        return "\n".join(parts)
