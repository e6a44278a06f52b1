"""The machine: what it is, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvpolicy.ops.cpu import native

__all__ = ["Machine", "survey"]

_REPEATS = 7


@dataclass(frozen=True)
class Machine:
    """What a bench ran on.

    Attributes:
        processor: name of the CPU or GPU.
        cores: CPUs that this process may use.
        threads: of torch.
        torch: version.
        python: version.
        copy: bytes a second that a large copy reads and writes, best of several.
        matmul: operations a second of a large product in the workload's dtype, best of several.
        kernel: whether kvpolicy's CPU kernel has been built (:mod:`kvpolicy.ops.cpu.native`).
    """

    processor: str
    cores: int
    threads: int
    torch: str
    python: str
    copy: float
    matmul: float
    kernel: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as ``results.json`` holds them."""
        return asdict(self)

    def roofline(self, weight_bytes: float, flops: float) -> float:
        """Seconds that a step takes at least: the slower of reading and multiplying."""
        return max(weight_bytes / self.copy, flops / self.matmul)


def survey(device: str, dtype: torch.dtype) -> Machine:
    """Measure the roofline; takes a second or two."""
    cuda = torch.device(device).type == "cuda"
    size = 1 << (30 if cuda else 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    side = 8192 if cuda else 2048
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    return Machine(
        processor=torch.cuda.get_device_name(device) if cuda else _processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        copy=2 * size / _best(lambda: target.copy_(source), cuda),
        matmul=2 * side**3 / _best(lambda: left @ right, cuda),
        kernel=not cuda and native.in_use() is not None,
    )


def _best(function: Callable[[], object], cuda: bool) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(_REPEATS):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def _processor() -> str:
    """The CPU's name, where the system tells."""
    try:
        for row in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
