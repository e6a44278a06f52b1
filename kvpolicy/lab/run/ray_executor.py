"""Jobs on a Ray cluster: Ray places them, starts workers, and replaces those that die."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kvpolicy.errors import ParameterError
from kvpolicy.lab.run.executor import DEATHS, Job, JobKind
from kvpolicy.lab.run.worker import Raised

__all__ = ["OnRay"]


@dataclass(frozen=True)
class OnRay:
    """A Ray cluster; where none is named, one of this machine that ends with the run.

    Attributes:
        workers: processors of a cluster that is started here.
        address: of a cluster that runs already. kvpolicy must be installed on its machines.
        name: for people.
    """

    workers: int
    address: str | None = None
    name: str = "ray"

    def run(self, jobs: Sequence[JobKind]) -> Generator[tuple[JobKind, Any], None, None]:
        """Do every job; see :class:`kvpolicy.lab.run.executor.Executor`."""
        ours = not ray.is_initialized()
        if ours:
            self._begin(max((job.threads or 1 for job in jobs), default=1))
        running: dict[Any, JobKind] = {}
        try:
            for job in jobs:
                # A worker that dies is Ray's business: it starts another and tries again.
                remote = ray.remote(
                    num_cpus=job.threads or 1, num_gpus=job.gpus, max_retries=DEATHS - 1
                )(_perform)
                running[remote.remote(job)] = job
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done)
                try:
                    outcome = ray.get(done)
                except ray.exceptions.RayError as error:
                    outcome = Raised(f"{type(error).__name__}: the worker was lost", str(error))
                yield job, outcome
        finally:
            for left in running:
                ray.cancel(left, force=True)
            if ours:
                ray.shutdown()

    def _begin(self, threads: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run here tells nobody
            # Where modules of the user's own lie is known here only.
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            options |= {
                "address": "local",  # never one that happens to run here
                "num_cpus": self.workers * threads,
                "include_dashboard": False,
                "runtime_env": {"env_vars": {"PYTHONPATH": path}},
            }
        else:
            options["address"] = self.address
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = self.address or "this machine"
            raise ParameterError(f"no Ray cluster at {where}: {error}") from error


def _perform(job: Job) -> Any:
    return job.perform()
