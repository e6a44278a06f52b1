"""The invariants that every policy is held to, each as one check of a policy on a stream.

A check drives the policy (through :func:`kvpolicy.testing.drive.drive`, never through stubs) and
raises :class:`~kvpolicy.testing.failure.PolicyCheckError` if what it saw breaks the invariant.
"""

from kvpolicy.testing.invariants import comparing_runs, one_run
from kvpolicy.testing.invariants.invariant import INVARIANTS, Case, Invariant, applicable

__all__ = ["INVARIANTS", "Case", "Invariant", "applicable", "comparing_runs", "one_run"]
