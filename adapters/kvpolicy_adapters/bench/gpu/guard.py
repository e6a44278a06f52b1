"""Each part in a process of its own, by the clock: what fails or hangs there ends there.

An assertion that fails on a GPU takes the process's whole CUDA context with it, and a kernel that
hangs can't be interrupted from inside. So a part has a process, tells what it finds as it goes,
and is killed with all that it started when its time is up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from kvpolicy.errors import KVPolicyError
from kvpolicy_adapters.bench.gpu.part import Finding, Outcome, Part, Setting

__all__ = ["run_part"]

#: With less than this left, a process would only just have begun.
_LEAST = 2.0
#: Seconds after which a part's process looks whether it is still wanted.
_LOOK = 0.5


def run_part(part: Part, setting: Setting, left: float) -> Outcome:
    """Run a part for as long as it may, and no longer than there is time.

    Args:
        part: which.
        setting: what it is given.
        left: seconds that are left for everything.

    Raises:
        KeyboardInterrupt: Ctrl-C; the part's process has been ended.
    """
    allowed = min(part.seconds, left)
    if allowed < _LEAST:
        return Outcome(part.name, "not begun", error="there was no time left")
    # A copy of this process has imported everything already. CUDA must not have begun in it.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, setting, theirs))
    outcome = Outcome(part.name, "out of time", error=f"ended after {allowed:.0f} seconds")
    begun = time.monotonic()
    process.start()
    theirs.close()
    try:
        while (rest := begun + allowed - time.monotonic()) > 0 and ours.poll(rest):
            try:
                told = ours.recv()
            except EOFError:  # killed, by the system or by a fault of its own
                process.join(_LEAST)
                outcome.state = "failed"
                outcome.error = f"the process ended by itself, with status {process.exitcode}"
                break
            if isinstance(told, Finding):
                outcome.findings[told.what] = told
            else:
                outcome.state, outcome.error = ("failed", told) if told else ("done", "")
                break
    finally:
        _end(process.pid)
        process.join()
        ours.close()
    outcome.seconds = time.monotonic() - begun
    return outcome


def _work(part: Part, setting: Setting, told: Connection) -> None:
    """In the part's process: run it, and say at last what was wrong, or nothing."""
    if hasattr(os, "setsid"):
        os.setsid()  # whatever it starts can be ended with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # what libraries print is not the report
    try:
        part.run(setting, told.send)
    except KVPolicyError as error:
        told.send(str(error))
    except Exception as error:
        told.send(f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:1000])
    else:
        told.send("")


def _end_with_parent() -> None:
    """Whoever is killed himself can end nobody: a process without a parent ends itself."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(_LOOK)
    _end(os.getpid())


def _end(process: int | None) -> None:
    """Kill a process, and all that it has started."""
    if process is None:
        return
    if hasattr(os, "killpg"):
        with suppress(OSError):
            os.killpg(process, signal.SIGKILL)
    with suppress(OSError):
        os.kill(process, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
