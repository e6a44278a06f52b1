"""How long a plan will take: from cells that have finished, else from a short timing."""

from __future__ import annotations

from pathlib import Path

from kvpolicy.decoding import Decoder
from kvpolicy.lab.run.run_folder import open_run
from kvpolicy.lab.run.runner import Prepared
from kvpolicy.lab.run.subject import Setting
from kvpolicy.lab.run.worker import threads_of_torch
from kvpolicy.named import make_policy

__all__ = ["estimate_seconds"]


def estimate_seconds(
    prepared: Prepared, out: Path, threads: int
) -> tuple[dict[str, float], str | None]:
    """Seconds of each cell, 0 for those that have finished.

    Args:
        prepared: the plan.
        out: folder of the run, which need not exist.
        threads: of torch, in each worker.

    Returns:
        Seconds by cell id, and where they come from; None where nothing is known.
    """
    known: dict[str, list[float]] = {}
    finished = set()
    if (out / "plan.json").exists():
        for done in open_run(out).finished():
            finished.add(done.record.id)
            known.setdefault(done.cell.label, []).append(done.record.seconds)
    means = {label: sum(seconds) / len(seconds) for label, seconds in known.items()}
    source = "from finished cells" if means else None
    waiting = [cell for cell in prepared.cells if cell.id not in finished]
    guess = getattr(prepared.subject, "estimate", None)
    with threads_of_torch(threads):
        for cell in waiting:
            if cell.label not in means and guess is not None:
                policy = make_policy(cell.policy, cell.parameters)
                setting = Setting(policy, cell.budget, Decoder.parse(cell.decoder))
                means[cell.label] = float(guess(setting))
                source = "from a short timing"
    if source is None and waiting:
        return dict.fromkeys(finished, 0.0), None
    rest = sum(means.values()) / len(means) if means else 0.0
    seconds = {cell.id: means.get(cell.label, rest) for cell in waiting}
    return seconds | dict.fromkeys(finished, 0.0), source or "nothing is left to do"
