"""Code in a process of its own, forked from one that has imported what all of them import.

For what a user would run in a fresh interpreter and that must not see, or change, this process.
Tests of what an import itself does start an interpreter instead.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

__all__ = ["OFFLINE", "Done", "run_code", "run_command", "run_script", "run_together"]

#: Code after which a process that asks for the network is refused, and says NETWORK.
OFFLINE = """
import socket, sys

def refuse(*args, **named):
    print("NETWORK", args, file=sys.stderr, flush=True)
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
"""

_PRELOADED = ["transformers.models.llama.modeling_llama", "kvpolicy_adapters", "kvpolicy.testing"]
_context = get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, folder: Path, timeout: float = 300) -> Done:
    """Run code as ``python -c`` would."""
    return _run((code, None, ()), folder, timeout)


def run_script(script: Path, *arguments: str, folder: Path, timeout: float = 300) -> Done:
    """Run a file as ``python script arguments`` would."""
    return _run((None, str(script), arguments), folder, timeout)


def run_together(script: Path, count: int, *arguments: str, folder: Path) -> None:
    """Run a file in processes that work together: ``python script RANK arguments``, one a rank."""
    with ThreadPoolExecutor(count) as threads:
        runs = [
            threads.submit(run_script, script, str(rank), *arguments, folder=folder)
            for rank in range(count)
        ]
        for run in runs:
            assert run.result().returncode == 0, run.result().stderr[-8000:]


def run_command(
    *arguments: str,
    folder: Path,
    timeout: float = 600,
    encoding: str = "utf-8",
    columns: int = 80,
    offline: bool = False,
) -> Done:
    """Run ``kvpolicy arguments`` in a terminal so wide that has an encoding's letters.

    Modules are found where this process finds them, and in the folder.
    """
    code = f"""{OFFLINE if offline else ""}
import os, sys
os.environ["COLUMNS"] = "{columns}"
sys.stdout.reconfigure(encoding={encoding!r})
sys.stderr.reconfigure(encoding={encoding!r}, errors="backslashreplace")
sys.argv = {["kvpolicy", *arguments]!r}
from kvpolicy.__main__ import main
main()
"""
    return run_code(code, folder, timeout)


def _run(what: tuple, folder: Path, timeout: float) -> Done:
    with tempfile.TemporaryDirectory() as made:
        out, err = Path(made, "out"), Path(made, "err")
        process = _context.Process(target=_child, args=(*what, str(folder), str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"not done after {timeout} s:\n{err.read_text()}")
        said = (each.read_text(encoding="utf-8", errors="replace") for each in (out, err))
        return Done(process.exitcode, *said)


def _child(
    code: str | None, script: str | None, arguments: tuple, folder: str, out: str, err: str
) -> None:
    # As in a terminal, also where these tests run in a shell's background, which ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    if script is not None:
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
        return
    sys.argv = ["-c"]
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(code, vars(main))
