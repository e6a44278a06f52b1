"""What ``kvpolicy bench`` measures, in a few lines of an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvpolicy.lab.bench.contender import Workload
from kvpolicy.lab.bench.machine import Machine
from kvpolicy.lab.bench.rounds import Plan, Rounds
from kvpolicy.lab.bench.run import Bench, capacity_of, enlist
from kvpolicy_adapters.bench.gpu.part import Finding, Setting, Tell
from kvpolicy_adapters.bench.shapes import LlamaBench

__all__ = ["measure"]

#: Each k-th line is measured; the others are filled.
_EVERY, _ROUNDS = 8, 3
#: Bytes and operations a second that no roofline is worked out from.
_UNKNOWN = 1.0


def measure(shape: str, batch: int, compiled: bool) -> Callable[[Setting, Tell], None]:
    """A part that measures one shape.

    Args:
        shape: one of ``kvpolicy bench``.
        batch: sequences.
        compiled: whether steps are compiled, into CUDA graphs on a GPU; else as they are, beside
            other projects' code where that is at hand.
    """
    return partial(_measure, shape, batch, compiled)


def _measure(shape: str, batch: int, compiled: bool, setting: Setting, tell: Tell) -> None:
    policies, baselines = ["linear", "full"], ["static", "dynamic", "floor", "skip"]
    if compiled:
        policies, baselines = ["linear@compiled"], ["static@compiled", "static"]
    bench = LlamaBench(setting.shape(shape), None, setting.torch_dtype, setting.device, 0)
    job = Bench(
        model=bench,
        workload=Workload(
            shape=setting.shape(shape),
            batch=1 if setting.tiny else batch,
            budget=setting.budget,
            capacity=capacity_of(setting.budget, bench.layout),
            layers=bench.dimensions.layers,
            device=setting.device,
            dtype=setting.dtype,
            seed=0,
        ),
        plan=Plan(
            lines=bench.layout.rows,
            line_length=bench.layout.line_length,
            rounds=1 if setting.tiny else _ROUNDS,
            every=_EVERY,
        ),
        contenders=enlist(
            policies,
            baselines,
            presses=setting.kvpress is not None and not compiled,
            llamagen=setting.llamagen is not None and not compiled,
        ),
        machine=Machine("", 0, 0, "", "", copy=_UNKNOWN, matmul=_UNKNOWN),
        real_layers=bench.real_layers,
        command="",
        environment=setting.kvpress,
        checkout=setting.llamagen,
    )
    job.measure(lambda count: None, partial(_tell, job, tell))


def _tell(job: Bench, tell: Tell, rounds: Rounds) -> None:
    """What the rounds so far have given."""
    summary = job.summarise(rounds, {})
    times = {figures.name: figures.mean_step for figures in summary.figures}
    for figures in summary.figures:
        row: dict[str, float | int | str] = {
            "ms/step": figures.mean_step * 1e3,
            "as fast as static": times["static"] / figures.mean_step,
            "cache MB": figures.cache_bytes / 1e6,
            "rounds": rounds.finished,
        }
        if figures.overhead is not None and figures.kind not in ("floor", "skip"):
            row["over floor"] = f"{figures.overhead.value:+.1%}"
        tell(Finding(figures.name, row))
