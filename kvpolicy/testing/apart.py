"""Work in a process of its own, so that a crash of that process is an answer in words."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Ending", "run_apart"]

#: What a child writes when its work has come to its end; nothing that is told begins with it.
_DONE = b"\0done"


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        status: what the work returned; None where it did not come to its end.
        told: what it told last.
        words: how it ended, where it did not come to its end: "it was ended by SIGSEGV".
    """

    status: int | None
    told: str
    words: str = ""


def run_apart(work: Callable[[Callable[[str], None]], int]) -> Ending:
    """Run some work in a copy of this process, and tell how that ended.

    The copy prints where this process prints. An exception that leaves the work is printed as ever,
    and is no crash: the status is 1. Where the system has no ``fork`` (Windows), the work runs in
    this process.

    Args:
        work: given a function that tells this process what is being done; returns a status.

    Raises:
        KeyboardInterrupt: Ctrl-C, which the copy got as well.
    """
    if not hasattr(os, "fork"):
        return Ending(work(lambda told: None), "")
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of others don't matter here
        child = os.fork()
    if child == 0:
        os.close(ours)
        os._exit(_as_child(work, theirs))  # nothing of what the parent has begun is ended twice
    os.close(theirs)
    told, whole, rest = "", False, b""
    try:
        while read := os.read(ours, 1 << 16):
            *lines, rest = (rest + read).split(b"\n")
            whole = whole or _DONE in lines
            told = next((line.decode() for line in reversed(lines) if line != _DONE), told)
        _, raw = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(ours)
    if os.WIFSIGNALED(raw):
        return Ending(None, told, _by_signal(os.WTERMSIG(raw)))
    status = os.WEXITSTATUS(raw)
    if whole:
        return Ending(status, told)
    return Ending(None, told, f"it left with exit status {status} before it was done")


def _as_child(work: Callable[[Callable[[str], None]], int], pipe: int) -> int:
    def tell(told: str) -> None:
        os.write(pipe, told.replace("\n", " ").encode(errors="replace") + b"\n")

    try:
        status = work(tell)
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:  # somebody else's: the work's own ending is its status
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(pipe, _DONE + b"\n")
    return status


def _by_signal(number: int) -> str:
    name = signal.Signals(number).name
    why = {
        signal.SIGSEGV: ": memory was read or written that is not its own",
        signal.SIGBUS: ": memory was read or written that is not there",
        signal.SIGKILL: ", which is what systems do when memory runs out",
    }.get(signal.Signals(number), "")
    return f"it was ended by {name}{why}"
