"""From the ``*_cpu.cpp`` of this folder to a library, with the system's C++ compiler.

Knows torch and nothing of kvpolicy, so that an installation can use it, too (``hatch_build.py``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "HEADERS",
    "SOURCES",
    "CompileError",
    "compile_library",
    "find_compiler",
    "flags",
    "run_in",
]

SOURCES = tuple(sorted(Path(__file__).parent.glob("*_cpu.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
#: No contraction: which products and sums are fused is written in the sources (see lanes.h).
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",
)

#: Runs a command, whose group of processes a reader of standard input belongs to. A line: all is
#: done. Its end without one: who wanted this has died, so all of it ends, and its folder goes.
_GROUP = """exec 3<&0 </dev/null
{
    trap '' TERM
    read _ <&3 || { kill -TERM 0; sleep 1; rm -rf "$0"; }
    kill -KILL 0
} >/dev/null 2>&1 &
exec "$@" 3<&-"""


class CompileError(RuntimeError):
    """The compiler failed; the message is what it said."""


def find_compiler(wanted: str | None = None) -> str | None:
    """Where the C++ compiler lies: the one wanted, ``$CXX``, or the first of c++, g++, clang++."""
    if wanted is not None:
        return shutil.which(wanted)
    names = (os.environ.get("CXX") or "c++", "g++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


def flags(march: str) -> tuple[str, ...]:
    """For a processor, as compilers name them."""
    return (*_FLAGS, f"-march={march}")


def compile_library(compiler: str, march: str, into: Path) -> None:
    """Compile all kernels into one library.

    OpenMP's functions are left open: torch's own library brings them, whatever it is called, so
    that both share its threads; a second one's would fight for the cores.

    Args:
        compiler: where it lies.
        march: the processor.
        into: the file to make, in a folder of its own.

    Raises:
        CompileError: the compiler fails.
    """
    torch_folder = Path(torch.__file__).parent
    headers = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    unit, object_file = into.with_suffix(".cpp"), into.with_suffix(".o")
    # One unit: most of the time goes into torch's headers, once for each.
    unit.write_text("".join(f'#include "{source}"\n' for source in SOURCES))
    compiled = [*flags(march), abi, *(f"-I{path}" for path in headers), "-c", str(unit)]
    linked = ["-shared", str(object_file), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    for arguments, made in ((compiled, object_file), (linked, into)):
        command = [compiler, *arguments, "-o", str(made)]
        done = run_in(into.parent, command)
        if done.returncode:
            raise CompileError(f"{compiler} failed ({done.returncode}):\n{done.stderr.strip()}")
    unit.unlink()
    object_file.unlink()


def run_in(
    folder: Path, command: list[str], timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command and what it starts in turn; both end where this process ends first.

    However that happens, by SIGKILL too: a compiler is processes of its own, which would go on.

    Args:
        folder: what the command works in; it is removed then, with all that is in it.
        command: the program and its arguments.
        timeout: seconds.
        options: of :class:`subprocess.Popen`.

    Returns:
        The exit status and what was printed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    reads, writes = os.pipe()
    script = ["/bin/sh", "-c", _GROUP, str(folder), *command]
    pipes: dict[str, Any] = {"stdin": reads, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        with subprocess.Popen(script, **pipes, text=True, process_group=0, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
                os.write(writes, b"\n")
            finally:
                os.close(writes)
    finally:
        os.close(reads)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
