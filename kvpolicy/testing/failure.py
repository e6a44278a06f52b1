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
        parts = [
            f"{policy} breaks an invariant.",
            f"Invariant {invariant!r}: {words}",
            f"Found: {found}",
        ]
        if story:
            parts.append(f"What happened:\n{story}")
        parts.append(f"Stream: {stream!r}")
        super().__init__("\n".join(parts))
