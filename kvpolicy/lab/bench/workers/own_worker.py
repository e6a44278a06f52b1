"""kvpolicy's own contenders in a process of their own, to watch what memory they take."""

from __future__ import annotations

from typing import Any

from protocol import serve

from kvpolicy.lab.bench.contender import Contender, Workload, load_shape
from kvpolicy.lab.bench.session import LocalSession


def make(job: dict[str, Any]) -> LocalSession:
    """The contender that the job names."""
    workload = Workload(**job["workload"])
    model = load_shape(
        workload.shape,
        layers=workload.layers,
        dtype=workload.torch_dtype,
        device=workload.device,
        seed=workload.seed,
    )
    return LocalSession(model, Contender(**job["contender"]), workload, singly=True)


if __name__ == "__main__":
    serve(make)
