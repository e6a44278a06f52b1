"""``python -m kvpolicy.testing.soak``: decode for long at a fixed budget; watch memory and time.

A text without an end, tiny tensors, tens of thousands of steps: what grows with the sequence is
seen, however little it is. Positions are int32, so that a sequence may have 2,147,483,647 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.errors import KVPolicyError, ParameterError
from kvpolicy.layout import TextLayout
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import available, create

__all__ = ["WARM_UP", "Soaked", "main", "resident_bytes", "soak"]

#: Steps until all that is allocated once has been allocated.
WARM_UP = 500
#: Growth of memory that is too much, and of time per step, from the first tenth to the last.
MOST_MEMORY = 0.01
MOST_TIME = 0.25


@dataclass(frozen=True)
class Soaked:
    """What a long generation cost.

    Attributes:
        policy: its name.
        steps: tokens that came, one a step.
        memory: resident bytes of the process after the warm-up.
        growth: the most that resident memory was above that later, as a share of it.
        early: median seconds of a step in the first tenth behind the warm-up.
        late: median seconds of a step in the last tenth.
        evictions: tokens that each head lost.
    """

    policy: str
    steps: int
    memory: int
    growth: float
    early: float
    late: float
    evictions: int


def resident_bytes() -> int:
    """Memory of this process that is in use now.

    Raises:
        ParameterError: the system has no ``/proc``.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError as error:
        raise ParameterError("resident memory is read from /proc, which is not here") from error
    import resource

    return pages * resource.getpagesize()


def soak(
    policy: EvictionPolicy | str,
    *,
    steps: int = 20_000,
    budget: int = 64,
    layers: int = 1,
    batch: int = 1,
    heads: int = 2,
    dim: int = 8,
) -> Soaked:
    """Decode a text without an end at a fixed budget, one token a step.

    Args:
        policy: the policy, or its name.
        steps: tokens.
        budget: evictable tokens a head of a layer.
        layers: layers.
        batch: sequences.
        heads: KV heads, one query head each.
        dim: head dim.

    Raises:
        ParameterError: there are too few steps to tell anything.
        KVPolicyError: whatever the cache raises.
    """
    if steps < 2 * WARM_UP:
        raise ParameterError(f"soak: steps={steps} must be at least {2 * WARM_UP}")
    layout = TextLayout(sinks=4, line_length=8)
    cache = PolicyCache(policy, budget, layout=layout, num_layers=layers)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 256, batch, heads, 1, dim, generator=generator)
    seconds = torch.zeros(steps, dtype=torch.float64)  # allocated now, so that it does not grow
    memory = most = 0
    with torch.inference_mode():
        for step in range(steps):
            query, key, value = drawn[:, step % 256]
            begun = time.perf_counter()
            for layer in range(layers):
                cache.attend(layer, query, key, value)
            seconds[step] = time.perf_counter() - begun
            if step == WARM_UP:
                memory = resident_bytes()
            elif step > WARM_UP and step % 100 == 0:
                most = max(most, resident_bytes())
    tenth = (steps - WARM_UP) // 10
    stats = cache.stats()
    return Soaked(
        policy=stats.policy,
        steps=steps,
        memory=memory,
        growth=max(most / memory - 1, 0.0),
        early=statistics.median(seconds[WARM_UP : WARM_UP + tenth].tolist()),
        late=statistics.median(seconds[-tenth:].tolist()),
        evictions=max(stats.evictions),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where memory or time has grown, 2 on wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpolicy.testing.soak",
        description="Decode for long at a fixed budget, and watch memory and time per step.",
    )
    parser.add_argument("--steps", type=int, default=20_000, help="tokens (20,000)")
    parser.add_argument("--budget", type=int, default=64, help="evictable tokens a head (64)")
    parser.add_argument("--policy", action="append", metavar="NAME", help="only these; repeatable")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait
    print(f"{'policy':16}{'steps':>8}{'evicted':>9}{'MB':>8}{'growth':>8}{'µs/step':>9}{'late':>7}")
    grown = False
    try:
        # All that a full cache could do is to be full.
        for name in given.policy or [name for name in available() if name != "full"]:
            done = soak(create(name), steps=given.steps, budget=given.budget)
            ratio = done.late / done.early
            bad = done.growth > MOST_MEMORY or ratio > 1 + MOST_TIME
            grown |= bad
            print(
                f"{done.policy:16}{done.steps:8,}{done.evictions:9,}{done.memory / 1e6:8.1f}"
                f"{done.growth:8.2%}{done.early * 1e6:9.0f}{ratio:7.2f}{'  GROWS' if bad else ''}",
                flush=True,
            )
    except KVPolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(grown)


if __name__ == "__main__":
    raise SystemExit(main())
