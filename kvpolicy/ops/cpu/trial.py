"""``python -m kvpolicy.ops.cpu.trial LIBRARY``: does it load, is it right, and is it faster?

Prints one line of JSON: how many times as fast each kernel is as torch without it, and up to how
many rows the one for skinny products is. A library that is damaged ends this process, not its
user's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.ops import change, rank
from kvpolicy.ops.attend import attend
from kvpolicy.ops.cpu import native
from kvpolicy.ops.key_lengths import find_unknown
from kvpolicy.ops.locality import is_local
from kvpolicy.ops.pool import pool
from kvpolicy.ops.priorities import priorities
from kvpolicy.ops.redundancy import cosines, redundancy

__all__: list[str] = []

#: A step of a model like LlamaGen-B: sequences, heads, slots, head dim, coming lines.
BATCH, HEADS, SLOTS, DIM, LINES = 8, 12, 97, 64, 6
ROWS = (2, 4, 8, 12, 16, 24, 32)
#: Seconds of measuring for each way.
_EACH = 0.06


def cases() -> dict[str, Callable[[], Tensor]]:
    """By kernel: an operation that uses it where it is there, and does without otherwise."""
    chance = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, BATCH, HEADS, SLOTS, DIM, generator=chance)
    mass = torch.rand(BATCH, HEADS, SLOTS, generator=chance)
    lines = torch.rand(BATCH, HEADS, LINES, SLOTS, generator=chance)
    order = torch.rand(BATCH, HEADS, SLOTS, generator=chance).argsort(-1)
    positions = order.to(torch.int32)
    out = positions < 1
    reading = torch.full_like(mass, -1.0)
    local: dict[str, Any] = {"seen": SLOTS, "window": 28, "share": 0.5, "may_be_empty": False}

    def find() -> Tensor:
        reading.fill_(-1.0)
        find_unknown(keys, reading, SLOTS)
        return reading.clone()

    return {
        "lowest": lambda: rank.lowest(mass, positions, 1, may_be_empty=False)[0],
        "pool": lambda: pool(mass, positions, newest=90, kernel=5, how="mean"),
        "is_local": lambda: is_local(mass, positions, **local),
        "key_lengths": find,
        "priorities": lambda: priorities(positions, 3),
        "cosines": lambda: cosines(keys, positions, out, similar=0.9).masked_fill(out, 0.0),
        "redundancy": lambda: redundancy(keys, positions, out, similar=0.9),
        "change_alone": lambda: change.alone(values, lines),
        "change_together": lambda: change.together(values, lines, mass, positions, 8),
    }


def step(operators: Any) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One decode step of a layer by the kernel, and by torch."""
    chance = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, BATCH, HEADS, 1, DIM, generator=chance)
    keys, values = torch.randn(2, BATCH, HEADS, SLOTS, DIM, generator=chance)
    positions = torch.arange(SLOTS, dtype=torch.int32).repeat(BATCH, HEADS, 1)
    slot = torch.full((BATCH, HEADS, 1), 5)
    wide = slot.unsqueeze(-1).expand(-1, -1, -1, DIM)

    def kernel() -> Tensor:
        token = (positions, slot, key, key, 5, SLOTS, DIM**-0.5, True)
        output: Tensor = operators.decode.default(query, keys, values, *token)[0]
        return output

    def plain() -> Tensor:
        keys.scatter_(2, wide, key)
        values.scatter_(2, wide, key)
        positions.scatter_(2, slot, 5)
        return attend(query, keys, values, need_mass=True)[0]

    return kernel, plain


def seconds(*ways: Callable[[], object]) -> list[float]:
    """Of a call of each, which take turns, so that all of them meet the same machine."""
    calls = []
    for way in ways:
        way()
        begin = time.perf_counter()
        way()
        calls.append(max(int(0.003 / max(time.perf_counter() - begin, 1e-7)), 1))
    found: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + _EACH * len(ways)
    while time.perf_counter() < end or len(found[0]) < 5:
        for way, count, times in zip(ways, calls, found, strict=True):
            begin = time.perf_counter()
            for _ in range(count):
                way()
            times.append((time.perf_counter() - begin) / count)
    return [min(times) for times in found]  # what a busy machine adds is nobody's


def rows_served(operators: Any) -> int:
    """Up to how many rows the kernel for skinny products takes no longer than torch."""
    chance = torch.Generator().manual_seed(2)
    weights = torch.randn(16, 1536, 768, generator=chance)  # too many for the caches
    turn = iter(range(1 << 62))
    served = 0
    for rows in ROWS:
        x = torch.randn(rows, 768, generator=chance)

        def kernel(x: Tensor = x) -> Tensor:
            found: Tensor = operators.linear.default(x, weights[next(turn) % 16], None)
            return found

        def plain(x: Tensor = x) -> Tensor:
            return functional.linear(x, weights[next(turn) % 16])

        product = operators.linear.default(x, weights[0], None)
        torch.testing.assert_close(product, functional.linear(x, weights[0]), rtol=1e-3, atol=1e-3)
        ours, theirs = seconds(kernel, plain)
        if theirs / ours >= native.SLOWEST:
            served = rows
        elif rows > 4:
            break
    return served


def main(path: str) -> None:
    """Load, compare, measure, print."""
    torch.set_num_threads(1)
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    operators = torch.ops.kvpolicy_cpu
    found = {}
    with torch.inference_mode():
        for name, operation in cases().items():

            def kernel(operation: Callable[[], Tensor] = operation) -> Tensor:
                native.operators = lambda: operators  # type: ignore[assignment]
                return operation()

            def plain(operation: Callable[[], Tensor] = operation) -> Tensor:
                native.operators = lambda: None  # type: ignore[assignment]
                return operation()

            torch.testing.assert_close(kernel(), plain(), rtol=1e-3, atol=1e-4, msg=name)
            ours, theirs = seconds(kernel, plain)
            found[name] = round(theirs / ours, 2)
        by_kernel, by_torch = step(operators)
        torch.testing.assert_close(by_kernel(), by_torch(), rtol=1e-3, atol=1e-4, msg="decode")
        ours, theirs = seconds(by_kernel, by_torch)
        found["decode"] = round(theirs / ours, 2)
        print(json.dumps({"times_as_fast": found, "most_rows": rows_served(operators)}))


if __name__ == "__main__":
    main(sys.argv[1])
