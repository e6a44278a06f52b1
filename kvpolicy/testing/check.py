"""check_policy: does my policy hold?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from kvpolicy.cache.cache import Reclaim
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.testing import faults, masks, rollback  # noqa: F401 (their invariants join the others)
from kvpolicy.testing.failure import PolicyCheckError
from kvpolicy.testing.invariants import INVARIANTS, Case, Invariant, applicable
from kvpolicy.testing.streams import Stream, streams

__all__ = ["Outcome", "check_each", "check_policy", "find_violation", "on_streams"]


@dataclass(frozen=True)
class Outcome:
    """What came of holding a policy to one invariant.

    Attributes:
        invariant: the invariant.
        streams: how many streams were tried, up to the one that shows a violation.
        violation: on the smallest stream that was found; None where the invariant holds.
    """

    invariant: Invariant
    streams: int
    violation: PolicyCheckError | None = None


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
    checked = _chosen(policy, invariants)
    found = find_violation(policy, checked, examples=examples, seed=seed)
    if found is None:
        return
    raise _smallest(policy, found, examples, seed)


def check_each(
    policy: EvictionPolicy,
    *,
    examples: int = 50,
    seed: int = 0,
    invariants: Sequence[str] | None = None,
    on_try: Callable[[Invariant, Stream], object] | None = None,
    on_stream: Callable[[], object] | None = None,
) -> tuple[Outcome, ...]:
    """Hold a policy to every invariant, and tell of each what came of it.

    Unlike :func:`check_policy` it goes on after a violation: the other invariants are checked too.
    A stream on which the policy raises counts for the invariant ``runs`` alone.

    Args:
        policy: the policy.
        examples: how many streams to try.
        seed: of the streams.
        invariants: names of those to check; by default all that apply.
        on_try: called before each invariant is tried on a stream.
        on_stream: called after each stream.

    Raises:
        ParameterError: ``policy`` is not a policy, or an invariant is unknown.
    """
    checked = _chosen(policy, invariants)
    tried = {invariant.name: 0 for invariant in checked}
    found: dict[str, PolicyCheckError] = {}

    def attempt(stream: Stream) -> None:
        case = Case(policy, stream)
        for invariant in checked:
            if invariant.name in found:
                continue
            if on_try is not None:
                on_try(invariant, stream)
            try:
                invariant(case)
            except PolicyCheckError as error:
                # A policy that raises breaks "runs", whichever check it was that drove it.
                if error.invariant == invariant.name:
                    tried[invariant.name] += 1
                    found[invariant.name] = error
                elif error.invariant in tried:
                    found.setdefault(error.invariant, error)
            else:
                tried[invariant.name] += 1
        if on_stream is not None:
            on_stream()

    on_streams(policy, attempt, examples=examples, seed=seed)
    return tuple(
        Outcome(
            invariant,
            tried[invariant.name],
            _smallest(policy, found[invariant.name], examples, seed)
            if invariant.name in found
            else None,
        )
        for invariant in checked
    )


def _chosen(policy: EvictionPolicy, invariants: Sequence[str] | None) -> list[Invariant]:
    """The invariants to check, after refusing what is no policy and what is no invariant."""
    if not isinstance(policy, EvictionPolicy):
        raise ParameterError(
            f"check_policy: {policy!r} is not an EvictionPolicy (give an instance)"
        )
    for name in invariants or ():
        if name not in INVARIANTS:
            raise ParameterError(
                f"no invariant is called {name!r}; {near_matches(name, INVARIANTS)}"
            )
    return [
        invariant
        for invariant in applicable(policy)
        if invariants is None or invariant.name in invariants
    ]


def _smallest(
    policy: EvictionPolicy, found: PolicyCheckError, examples: int, seed: int
) -> PolicyCheckError:
    """The same violation on the smallest stream that shows it.

    Looks for this invariant alone, so that shrinking does not slip to another one.
    """
    blamed = [INVARIANTS[found.invariant]]
    return find_violation(policy, blamed, examples=examples, seed=seed, shrink=True) or found


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

    def attempt(stream: Stream) -> None:
        case = Case(policy, stream)
        for invariant in invariants:
            invariant(case)

    return on_streams(policy, attempt, examples=examples, seed=seed, reclaim=reclaim, shrink=shrink)


def on_streams(
    policy: EvictionPolicy,
    attempt: Callable[[Stream], None],
    *,
    examples: int,
    seed: int = 0,
    reclaim: Reclaim | None = None,
    shrink: bool = False,
) -> PolicyCheckError | None:
    """Call ``attempt`` with generated streams that suit a policy, until it raises.

    Args:
        policy: the policy.
        attempt: raises :class:`PolicyCheckError` on a stream that shows a violation.
        examples: how many streams to try.
        seed: of the streams.
        reclaim: one way to reclaim; both by default.
        shrink: whether to look for a smaller stream that shows the violation too.

    Returns:
        What ``attempt`` raised last, which is on the smallest stream; None if it never did.
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
    def search(stream: Stream) -> None:
        nonlocal found
        try:
            attempt(stream)
        except PolicyCheckError as error:
            error.shrunk = shrink
            found = error
            raise

    try:
        search()
    except Exception:
        # Hypothesis wraps what a policy that is not deterministic raises; `found` says it better.
        if found is None:
            raise
    return found
