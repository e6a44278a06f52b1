"""The conformance suite: holds anybody's policy to the invariants that the shipped ones keep.

    from kvpolicy.testing import check_policy
    check_policy(MyPolicy())

Needs hypothesis (``pip install "kvpolicy[testing]"``).
"""

from kvpolicy.named import policy_named
from kvpolicy.testing.check import Outcome, check_each, check_policy, find_violation
from kvpolicy.testing.drive import Trace, drive
from kvpolicy.testing.failure import PolicyCheckError
from kvpolicy.testing.invariants import INVARIANTS, Case, Invariant, applicable
from kvpolicy.testing.streams import Stream, Tokens, streams

__all__ = [
    "INVARIANTS",
    "Case",
    "Invariant",
    "Outcome",
    "PolicyCheckError",
    "Stream",
    "Tokens",
    "Trace",
    "applicable",
    "check_each",
    "check_policy",
    "drive",
    "find_violation",
    "policy_named",
    "streams",
]
