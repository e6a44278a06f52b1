"""Where jobs are done: in this process, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from typing import Any

from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.run.executor import DEATHS, Executor, Job, JobKind
from kvpolicy.lab.run.worker import Raised

__all__ = ["Inline", "Processes", "make_executor", "processors"]

#: Seconds that a worker has to end by itself.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Inline:
    """One job after the other, in this process."""

    name: str = "inline"
    workers: int = 1

    def run(self, jobs: Sequence[JobKind]) -> Generator[tuple[JobKind, Any], None, None]:
        """Do every job; see :class:`~kvpolicy.lab.run.executor.Executor`."""
        for job in jobs:
            yield job, job.perform()


@dataclass(eq=False)
class _Worker:
    """One process, its end of the pipe, and the job that it has."""

    process: Any
    pipe: Any
    job: Any = None


@dataclass(frozen=True)
class Processes:
    """Processes of this machine, each with a job of its own.

    A process that dies takes only the try of its own job with it: it is replaced, and its job is
    tried again, up to ``DEATHS`` times. Where this process dies, however suddenly, its workers end
    at once, so that no job is done twice by those left over.
    """

    workers: int
    name: str = "processes"
    _context: Any = field(default_factory=lambda: get_context("spawn"), repr=False)

    def run(self, jobs: Sequence[JobKind]) -> Generator[tuple[JobKind, Any], None, None]:
        """Do every job; see :class:`~kvpolicy.lab.run.executor.Executor`."""
        waiting = deque(jobs)
        deaths: dict[str, int] = {}
        crew = [self._start() for _ in range(min(self.workers, len(waiting)))]
        try:
            while waiting or any(worker.job for worker in crew):
                for worker in crew:
                    if worker.job is None and waiting:
                        worker.job = waiting.popleft()
                        with suppress(OSError):  # dead already: seen below
                            worker.pipe.send(worker.job)
                ready = set(connection.wait([w.pipe for w in crew if w.job]))
                for number, worker in enumerate(crew):
                    if worker.pipe not in ready or (job := worker.job) is None:
                        continue
                    try:
                        outcome = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.pipe.close()
                        worker.process.join()
                        crew[number] = self._start()
                        died = deaths[job.id] = deaths.get(job.id, 0) + 1
                        if died < DEATHS:
                            waiting.append(job)
                            continue
                        outcome = Raised(*_death(worker.process.exitcode))
                    else:
                        worker.job = None
                    yield job, outcome
        finally:
            for worker in crew:
                worker.pipe.close()
                worker.process.terminate()
            for worker in crew:
                worker.process.join(_PATIENCE)
                if worker.process.is_alive():  # stopped, or deaf: only this ends it
                    worker.process.kill()
                    worker.process.join()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        with _without_interrupts():
            process.start()
        theirs.close()
        return _Worker(process, ours)


def _serve(pipe: Any) -> None:
    """A worker's life: a job in, an outcome out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what libraries print, below Python, is not for standard output either
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send(job.perform())


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C, which is for this process alone; children started here never get it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _death(exitcode: int) -> tuple[str, str]:
    """What became of a worker, in a line, and what may have been the cause."""
    cause = f"exit status {exitcode}"
    if exitcode < 0:
        with suppress(ValueError):
            cause = signal.Signals(-exitcode).name
    error = f"the worker died {DEATHS} times ({cause})"
    advice = (
        "No traceback: the process ended without one. SIGKILL mostly means that memory ran out; "
        "fewer workers may help."
    )
    return error, advice


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_executor(name: str, workers: int | None, threads: int, address: str | None) -> Executor:
    """An executor by its name: ``inline``, ``processes`` or ``ray``.

    Args:
        name: which.
        workers: jobs at a time; by default as many as processors allow with these threads. A
            Ray cluster that runs elsewhere has its own number.
        threads: of torch, in each worker.
        address: of a Ray cluster; None for one of this machine.

    Raises:
        ParameterError: the name is unknown, or an argument does not go with it.
    """
    if address is not None and name != "ray":
        raise ParameterError(f"address={address!r} is of a Ray cluster: it needs executor 'ray'")
    count = workers or max(1, processors() // threads)
    if name == "inline":
        if workers not in (None, 1):
            raise ParameterError(f"workers={workers}: executor 'inline' has one")
        return Inline()
    if name == "processes":
        return Processes(count)
    if name == "ray":
        from kvpolicy.lab.run.ray_executor import OnRay

        return OnRay(count, address)
    known = ("inline", "processes", "ray")
    raise ParameterError(f"no executor is called {name!r}; {near_matches(name, known)}")
