"""A line of JSON in, a line of JSON out. Run beside the worker, never with kvpolicy imported."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["serve", "settle", "tokens_of"]


def tokens_of(job: dict[str, Any]) -> torch.Tensor:
    """The workload's tokens, drawn as kvpolicy draws them."""
    chance = torch.Generator().manual_seed(job["workload"]["seed"])
    size = (job["workload"]["batch"], job["length"])
    return torch.randint(job["dimensions"]["vocab"], size, generator=chance)


def settle(device: str) -> float:
    """Wait for the device; the time then."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """Answer until the input ends.

    Args:
        make: takes the first message and gives an object with ``restart()``, ``run(count)``,
            ``skip(count)``, ``wake()``, ``cache_bytes()`` and ``release()``.
    """
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr
    worker: Any = None
    base = 0
    for line in sys.stdin:
        message = json.loads(line)
        answer: dict[str, Any] = {}
        with torch.inference_mode():
            if message["do"] == "open":
                torch.set_num_threads(message["threads"])
                worker = make(message)
            elif message["do"] == "restart":
                worker.restart()
            elif message["do"] == "release":
                worker.release()
            elif message["do"] == "watch":
                worker.release()
                base = _reset_peak()
            elif message["do"] == "run":
                seconds, read = worker.run(message["count"])
                answer = {"seconds": seconds, "read": read}
            elif message["do"] == "skip":
                worker.skip(message["count"])
            elif message["do"] == "wake":
                worker.wake()
            elif message["do"] == "cache_bytes":
                answer = {"bytes": worker.cache_bytes()}
            elif message["do"] == "memory":
                answer = {"bytes": _peak() - base}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _reset_peak() -> int:
    """Begin to watch memory anew; bytes in use now."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return 0


def _peak() -> int:
    """Most bytes in use since."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        return _status("VmHWM")
    except OSError:
        return 0


def _status(field: str) -> int:
    for row in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if row.startswith(field + ":"):
            return int(row.split()[1]) * 1024
    raise OSError(field)
