"""check_policy: does my policy hold?"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from kvpolicy.cache import Reclaim
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.policy import EvictionPolicy
from kvpolicy.testing.failure import PolicyCheckError
from kvpolicy.testing.invariants import INVARIANTS, Case, Invariant, applicable
from kvpolicy.testing.streams import Stream, streams

__all__ = ["check_policy", "find_violation"]


def check_policy(
    policy: EvictionPolicy,
    *,
    examples: int = 50,
    seed: int = 0,
    invariants: Sequence[str] | None = None,
) -> None:
    """Hold a policy to every invariant, on generated streams.

    The policy is driven through :class:`kvpolicy.PolicyCache` with raster and text layouts, budgets
    from its smallest to more than there is to cache, several layers, samples and heads, both ways
    to reclaim, tokens one by one and in chunks, and attention with ties, zeros and extremes.

    Example:
        >>> import kvpolicy
        >>> from kvpolicy.testing import check_policy
        >>> check_policy(kvpolicy.create("h2o"), examples=5)

    Args:
        policy: the policy. Small parameters (few anchors, short windows) make small streams, and
            a fast check.
        examples: how many streams to try.
        seed: of the streams: the same seed tries the same ones.
        invariants: names of those to check, out of ``INVARIANTS``; by default all that apply.

    Raises:
        PolicyCheckError: an invariant is broken; the message says which, in words, shows the
            smallest stream found that shows it, and what the policy did at which step.
        ParameterError: ``policy`` is not a policy, or an invariant is unknown.
    """
    if not isinstance(policy, EvictionPolicy):
        raise ParameterError(
            f"check_policy: {policy!r} is not an EvictionPolicy (give an instance)"
        )
    for name in invariants or ():
        if name not in INVARIANTS:
            raise ParameterError(
                f"no invariant is called {name!r}; {near_matches(name, INVARIANTS)}"
            )
    checked = [
        invariant
        for invariant in applicable(policy)
        if invariants is None or invariant.name in invariants
    ]
    found = find_violation(policy, checked, examples=examples, seed=seed)
    if found is None:
        return
    # Look again for this invariant alone, so that shrinking does not slip to another one.
    blamed = [invariant for invariant in checked if invariant.name == found.invariant]
    smallest = find_violation(policy, blamed, examples=examples, seed=seed, shrink=True)
    raise smallest or found


def find_violation(
    policy: EvictionPolicy,
    invariants: Sequence[Invariant],
    *,
    examples: int,
    seed: int = 0,
    reclaim: Reclaim | None = None,
    shrink: bool = False,
) -> PolicyCheckError | None:
    """The first violation found on generated streams, or None.

    Args:
        policy: the policy.
        invariants: what to hold it to.
        examples: how many streams to try.
        seed: of the streams.
        reclaim: one way to reclaim; both by default.
        shrink: whether to look for a smaller stream that shows the violation too.
    """
    found: PolicyCheckError | None = None

    @seeded(seed)
    @settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(streams(policy, reclaim))
    def attempt(stream: Stream) -> None:
        nonlocal found
        case = Case(policy, stream)
        try:
            for invariant in invariants:
                invariant(case)
        except PolicyCheckError as error:
            found = error
            raise

    try:
        attempt()
    except Exception:
        # Hypothesis wraps what a policy that is not deterministic raises; `found` says it better.
        if found is None:
            raise
    return found
