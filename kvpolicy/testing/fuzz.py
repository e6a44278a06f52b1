"""``python -m kvpolicy.testing.fuzz --minutes 10``: random policies, for as long as you like.

Each run draws a policy with random parameters and drives it through random streams (layouts,
budgets, dtypes, step patterns; see ``streams``), held to every invariant, and once more with
copies, exceptions, masks and tokens that are taken back all in one generation (``mixed``); or,
where a package offers a driver for whole models, through one of those. What a run does follows from
its seed alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, get_args

import torch

from kvpolicy.errors import KVPolicyError, ParameterError, near_matches
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import Registry, available
from kvpolicy.testing.check import on_streams
from kvpolicy.testing.draw import draw_policy
from kvpolicy.testing.invariants import Case, applicable
from kvpolicy.testing.mixed import check_mixed
from kvpolicy.testing.streams import Dtype, Stream

__all__ = ["DRIVERS", "Driver", "Tally", "Violation", "fuzz", "main"]

#: Streams that a policy is driven through in one run.
STREAMS = 8
_DTYPES = get_args(Dtype)


@dataclass
class Tally:
    """What was run.

    Attributes:
        runs: times that a policy was drawn.
        streams: streams, or sequences of a model, that were driven.
        tokens: tokens that they had, times their sequences.
        decisions: times that a policy was asked for victims.
        evictions: tokens that were lost, over heads, sequences and layers.
        exceptions: calls that were interrupted.
        copies: caches that went on as copies, or from a file.
        masks: calls with a mask of their own.
        commits: times that tokens were taken back.
    """

    runs: int = 0
    streams: int = 0
    tokens: int = 0
    decisions: int = 0
    evictions: int = 0
    exceptions: int = 0
    copies: int = 0
    masks: int = 0
    commits: int = 0

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Driver(Protocol):
    """Drives a policy through something else than streams, e.g. a model of transformers."""

    def __call__(self, policy: EvictionPolicy, seed: int) -> Tally:
        """Drive it once; all that happens follows from policy and seed.

        Raises:
            AssertionError: something that must hold did not; the message says what. Any other
                exception is a violation, too.
        """


#: What packages offer beside the core's streams.
DRIVERS: Registry[Driver] = Registry("fuzz driver", "kvpolicy.fuzz")


@dataclass
class Violation(Exception):
    """What a run found.

    Attributes:
        seed: of the run.
        policy: the policy.
        on: ``core``, or the driver's name.
        error: what was raised, on the smallest stream found.
    """

    seed: int
    policy: EvictionPolicy
    on: str
    error: Exception

    def __str__(self) -> str:
        return (
            f"seed {self.seed}, on {self.on}, {self.policy!r}: {type(self.error).__name__}: "
            f"{self.error}\n"
            f"To see it again: python -m kvpolicy.testing.fuzz --seed {self.seed} --runs 1 "
            f"--model {self.on}"
        )


@dataclass
class Fuzz:
    """Counts of a whole session.

    Attributes:
        tallies: by policy and what it ran on.
        seconds: how long it took.
    """

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    seconds: float = 0.0

    def table(self) -> str:
        """Counts by policy, then of all, as lines of text."""
        columns = list(vars(Tally()))
        lines = [f"{'policy':16}{'on':14}" + "".join(f"{name:>11}" for name in columns)]
        total = Tally()
        for (policy, on), tally in sorted(self.tallies.items()):
            total += tally
            lines.append(f"{policy:16}{on:14}" + _figures(tally))
        lines.append(f"{'all':16}{'':14}" + _figures(total))
        return "\n".join(lines)


def _figures(tally: Tally) -> str:
    return "".join(f"{value:>11,}" for value in vars(tally).values())


def fuzz(
    *,
    seed: int = 0,
    minutes: float | None = None,
    runs: int | None = None,
    on: Sequence[str] = ("core",),
    policies: Sequence[str] | None = None,
    said: Callable[[Fuzz], object] | None = None,
) -> Fuzz:
    """Run random policies until the time, or the number of runs, is up.

    Args:
        seed: of the first run; each further one has the next number.
        minutes: how long.
        runs: how many.
        on: ``core``, and names of drivers: which one a run takes follows from its seed.
        policies: names in the registry to draw from; all by default.
        said: called now and then with the counts so far.

    Raises:
        Violation: an invariant is broken.
        ParameterError: neither minutes nor runs are given, or a name is unknown.
    """
    if minutes is None and runs is None:
        raise ParameterError("fuzz: give minutes or runs")
    names = available() if policies is None else policies
    for name in names:
        if name not in available():
            raise ParameterError(f"no policy is called {name!r}; {near_matches(name, available())}")
    drivers = {name: _on_core if name == "core" else DRIVERS.get(name) for name in on}
    session = Fuzz()
    begun = told = time.monotonic()
    done = 0
    while runs is None or done < runs:
        session.seconds = time.monotonic() - begun
        if minutes is not None and session.seconds >= minutes * 60:
            break
        rng = random.Random(seed + done)
        policy = draw_policy(rng, names)
        name = rng.choice(list(on))
        try:
            tally = drivers[name](policy, seed + done)
        except Exception as error:  # whatever it is, a policy drawn from its fields must run
            raise Violation(seed + done, policy, name, error) from error
        held = session.tallies.setdefault((policy.key, name), Tally())
        tally.runs = 1
        held += tally
        done += 1
        if said is not None and time.monotonic() - told > 30:
            told = time.monotonic()
            said(session)
    session.seconds = time.monotonic() - begun
    return session


def _on_core(policy: EvictionPolicy, seed: int) -> Tally:
    """Drive a policy through a few streams, held to every invariant."""
    tally = Tally()
    invariants = applicable(policy)

    def attempt(stream: Stream) -> None:
        case = Case(policy, _in_any_dtype(stream))
        for invariant in invariants:
            invariant(case)
        happened = check_mixed(case)
        stats = case.trace.stats
        assert stats is not None
        tally.streams += 1
        tally.tokens += stream.tokens * stream.batch
        tally.decisions += len(case.trace.decisions)
        tally.evictions += sum(stats.evictions) * stream.batch * stream.heads
        tally.exceptions += happened.exceptions
        tally.copies += happened.copies
        tally.masks += happened.masks
        tally.commits += happened.commits

    found = on_streams(policy, attempt, examples=STREAMS, seed=seed)
    if found is None:
        return tally
    blamed = {invariant.name: invariant for invariant in invariants}.get(
        found.invariant, check_mixed
    )

    def again(stream: Stream) -> None:
        blamed(Case(policy, _in_any_dtype(stream)))

    raise on_streams(policy, again, examples=STREAMS, seed=seed, shrink=True) or found


def _in_any_dtype(stream: Stream) -> Stream:
    return replace(stream, dtype=_DTYPES[stream.seed % len(_DTYPES)])


def _drivers(chosen: Sequence[str] | None) -> list[str]:
    """What to run on: what was asked for, or the core and every driver that can be loaded."""
    if chosen:
        return list(chosen)
    loaded = ["core"]
    for name in DRIVERS.names():
        try:
            DRIVERS.get(name)
        except ParameterError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            loaded.append(name)
    return loaded


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 on a violation, 2 on wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpolicy.testing.fuzz",
        description="Run random policies through random streams and models, held to invariants.",
    )
    parser.add_argument("--minutes", type=float, help="how long (1, if --runs is not given)")
    parser.add_argument("--runs", type=int, help="how many policies")
    parser.add_argument("--seed", type=int, help="of the first run; a new one every time if none")
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help=f"run on this: core, {', '.join(DRIVERS.names()) or 'nothing else here'}; repeatable; "
        f"all if none",
    )
    parser.add_argument("--policy", action="append", metavar="NAME", help="only these; repeatable")
    given = parser.parse_args(arguments)
    if given.minutes is None and given.runs is None:
        given.minutes = 1.0
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait
    print(f"seed {seed}", flush=True)
    try:
        session = fuzz(
            seed=seed,
            minutes=given.minutes,
            runs=given.runs,
            on=_drivers(given.model),
            policies=given.policy,
            said=lambda so_far: print(
                f"{so_far.seconds:.0f} s: {sum(t.runs for t in so_far.tallies.values()):,} runs",
                flush=True,
            ),
        )
    except Violation as violation:
        print(violation)
        return 1
    except KVPolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(session.table())
    print(f"no violation in {session.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
