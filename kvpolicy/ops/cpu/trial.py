"""``python -m kvpolicy.ops.cpu.trial LIBRARY``: does it load, is it right, and is it faster?

Prints one line of JSON: how many times as fast each kernel is as torch without it, in each dtype
that it serves, and up to how many rows the one for skinny products is; with ``--only-compare``
nothing is measured. A library that is damaged ends this process, not its user's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
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
#: What reads keys or values, and so is measured in each of their dtypes.
OF_TOKENS = ("key_lengths", "cosines", "redundancy", "change_alone", "change_together")
#: Seconds of measuring for each way; and at most, where the machine is busy with something else.
_EACH, _MOST = 0.06, 0.3
#: How well a ratio is to be known: the standard error of its median.
_WELL = 0.01


def cases(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """By kernel: an operation that uses it where it is there, and does without otherwise.

    Args:
        dtype: of keys and values; nothing else is there but in float32.
    """
    chance = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, BATCH, HEADS, SLOTS, DIM, generator=chance).to(dtype)
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

    found = {
        "lowest": lambda: rank.lowest(mass, positions, 1, may_be_empty=False)[0],
        "pool": lambda: pool(mass, positions, newest=90, kernel=5, how="mean"),
        "is_local": lambda: is_local(mass, positions, **local),
        "key_lengths": find,
        "priorities": lambda: priorities(positions, 3).to(torch.int64),  # as which they are exact
        "cosines": lambda: cosines(keys, positions, out, similar=0.9).masked_fill(out, 0.0),
        "redundancy": lambda: redundancy(keys, positions, out, similar=0.9),
        "change_alone": lambda: change.alone(values, lines),
        "change_together": lambda: change.together(values, lines, mass, positions, 8),
    }
    of_all = dtype == torch.float32
    return {name: case for name, case in found.items() if of_all or name in OF_TOKENS}


def step(operators: Any, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One decode step of a layer by the kernel, and by torch."""
    chance = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, BATCH, HEADS, 1, DIM, generator=chance).to(dtype)
    keys, values = torch.randn(2, BATCH, HEADS, SLOTS, DIM, generator=chance).to(dtype)
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


def times_as_fast(kernel: Callable[[], object], plain: Callable[[], object]) -> float:
    """The kernel as torch without it: the median over pairs of runs that stand side by side.

    Counted is this thread's own time, which stands still while others have the processor; what they
    do to its caches, a run shares with its neighbour, or it moves that pair alone. Where pairs
    differ much, more of them are made.
    """
    calls = []
    for way in (kernel, plain):
        way()
        begin = time.thread_time()
        way()
        calls.append(max(int(0.001 / max(time.thread_time() - begin, 1e-6)), 1))
    ratios: list[float] = []
    begun = time.perf_counter()
    while True:
        spent: dict[Callable[[], object], float] = {}
        pairs = [(kernel, calls[0]), (plain, calls[1])]
        for way, count in pairs if len(ratios) % 2 else reversed(pairs):
            begin = time.thread_time()
            for _ in range(count):
                way()
            spent[way] = (time.thread_time() - begin) / count
        ratios.append(spent[plain] / spent[kernel])
        enough = time.perf_counter() - begun > 2 * _EACH and len(ratios) >= 8
        if (enough and _error(ratios) < _WELL) or time.perf_counter() - begun > 2 * _MOST:
            return statistics.median(ratios)


def _error(ratios: list[float]) -> float:
    """The standard error of a median, as a share of it, from the quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return 0.93 * (high - low) / (middle * math.sqrt(len(ratios)))


def rows_served(operators: Any, *, measure: bool) -> int:
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
        if not measure:
            continue
        # Asked twice before more rows are given up.
        if any(times_as_fast(kernel, plain) >= native.SLOWEST for _ in range(2)):
            served = rows
        elif rows > 4:
            break
    return served


def main(path: str, *, measure: bool) -> None:
    """Load, compare, measure, print."""
    torch.set_num_threads(1)
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    operators = torch.ops.kvpolicy_cpu
    found: dict[str, float] = {}

    def hold(name: str, kernel: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
        gave, wanted = kernel(), plain()
        near = 0.0  # slots and priorities
        if gave.dtype.is_floating_point:
            near = 1e-4 if gave.dtype.itemsize > 2 else 1e-2  # what is rounded, is on both sides
        torch.testing.assert_close(gave, wanted, rtol=10 * near, atol=near, msg=name)
        if measure:
            found[name] = round(times_as_fast(kernel, plain), 2)

    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name, operation in cases(dtype).items():

                def kernel(operation: Callable[[], Tensor] = operation) -> Tensor:
                    native.operators = lambda: operators  # type: ignore[assignment]
                    return operation()

                def plain(operation: Callable[[], Tensor] = operation) -> Tensor:
                    native.operators = lambda: None  # type: ignore[assignment]
                    return operation()

                hold(native.measure_of(name, dtype), kernel, plain)
            hold(native.measure_of("decode", dtype), *step(operators, dtype))
        rows = rows_served(operators, measure=measure)
    print(json.dumps({"times_as_fast": found, "most_rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--only-compare", action="store_true")
    given = parser.parse_args()
    main(given.library, measure=not given.only_compare)
