"""The largest batch that fits into the device's memory, weights included."""

from __future__ import annotations

import gc
from functools import partial

import torch

from kvpolicy.lab.bench.contender import Contender, Workload
from kvpolicy.lab.bench.fit import largest_batch
from kvpolicy.lab.bench.peers import PeerError
from kvpolicy.lab.bench.run import capacity_of
from kvpolicy.lab.bench.session import LocalSession
from kvpolicy_adapters.bench.gpu.part import Finding, Setting, Tell
from kvpolicy_adapters.bench.shapes import LlamaBench

__all__ = ["find_largest_batch"]

_CONTENDERS = (
    Contender("linear", "policy", policy="linear"),
    Contender("full", "policy", policy="full"),
    Contender("static", "static"),
)
#: On a CPU, bytes of weights, keys and values.
_TINY = 200_000


def find_largest_batch(setting: Setting, tell: Tell) -> None:
    """One row a contender; a batch fits if the last step of its image has been decoded."""
    shape = setting.shape("llamagen-b")
    bench = LlamaBench(shape, None, setting.torch_dtype, setting.device, 0)
    limit = _TINY
    if setting.cuda:
        limit = torch.cuda.mem_get_info(setting.device)[0] + torch.cuda.memory_allocated(
            setting.device
        )
    for contender in _CONTENDERS:
        largest = largest_batch(
            partial(_grown, bench, contender, setting, tell),
            bench.dimensions,
            setting.torch_dtype.itemsize,
            limit,
        )
        figures = {"sequences": largest.batch, "GB": largest.used / 1e9, "of GB": limit / 1e9}
        tell(Finding(contender.name, figures, "" if largest.batch else "not even one fits"))


def _grown(
    bench: LlamaBench, contender: Contender, setting: Setting, tell: Tell, batch: int
) -> int:
    """Bytes that an image of a batch takes beside the weights.

    Raises:
        PeerError: memory has ended before.
    """
    workload = Workload(
        shape=setting.shape("llamagen-b"),
        batch=batch,
        budget=setting.budget,
        capacity=capacity_of(setting.budget, bench.layout),
        layers=bench.dimensions.layers,
        device=setting.device,
        dtype=setting.dtype,
        seed=0,
    )
    base = torch.cuda.memory_allocated(setting.device) if setting.cuda else 0
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    session = LocalSession(bench, contender, workload, singly=True)
    try:
        session.restart()
        session.skip(bench.layout.length - bench.layout.prefix - 1)
        session.run(1)
        # Where nobody counts a CPU's memory, keys and values stand for it.
        used = session.cache_bytes()
        if setting.cuda:
            used = torch.cuda.max_memory_allocated(setting.device) - base
    except torch.OutOfMemoryError as error:
        raise PeerError(f"out of memory at a batch of {batch}") from error
    finally:
        session.close()
        gc.collect()
        if setting.cuda:
            torch.cuda.empty_cache()
    # The newest is told at once: there may be no time for another.
    tell(Finding(contender.name, {"sequences": f"at least {batch}", "GB": used / 1e9}))
    return used
