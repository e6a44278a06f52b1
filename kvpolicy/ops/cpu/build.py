"""Building the CPU kernels: compiled, tried in a process of its own, and only then put in place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvpolicy.ops.cpu as here
from kvpolicy.errors import KernelError
from kvpolicy.ops.cpu import native
from kvpolicy.ops.cpu.compiling import CompileError, compile_library, find_compiler, run_in

__all__ = ["build"]

#: Seconds that a trial may take, on a machine as busy as may be.
_PATIENCE = 300


def build(compiler: str | None = None) -> Path:
    """Compile the kernels, unless that has been done and what is there is whole.

    They are loaded by a process of their own, which computes with each of them what torch computes
    without, and measures both: where a kernel is not the faster one on this machine, torch goes on
    doing it. What was chosen lies beside the library, in a file of JSON. Where there is no
    compiler, the library that came with the installation is tried and measured instead.

    Args:
        compiler: the C++ compiler; by default ``$CXX``, or the first of c++, g++ and clang++.

    Returns:
        The library. It is used by processes that start decoding from now on.

    Raises:
        KernelError: there is no compiler, or it fails, or what it made can't be loaded or computes
            something else, or the folder can't be written, or others can write it; nothing is
            left behind then.
    """
    into = native.library()
    if native.whole(into):
        return into
    found = find_compiler(compiler)
    brought = native.shipped() if found is None and compiler is None else None
    if found is None and brought is None:
        wanted = compiler or "c++, g++ or clang++"
        raise KernelError(f"no C++ compiler ({wanted}) is on the PATH; kvpolicy works without one")
    try:
        _make(into.parent)
        refused = native.untrusted(into.parent)
        if refused is not None:
            raise KernelError(
                f"no code would be loaded from {into.parent}: {refused}; see to that (chmod go-w), "
                f"or name another folder in $KVPOLICY_KERNELS"
            )
        with _alone(into.parent):
            if native.whole(into):  # another process was first
                return into
            with tempfile.TemporaryDirectory(dir=into.parent, prefix="building-") as folder:
                made = Path(folder, into.name)
                if found is not None:
                    compile_library(found, native.march(), made)
                elif brought is not None:
                    shutil.copyfile(brought, made)
                made.chmod(0o700)
                figures = Path(folder, "figures.json")
                report = _try(made) | {"sha256": native.digest(made)}
                figures.write_text(json.dumps(report), encoding="utf-8")
                figures.chmod(0o600)
                # Figures first: a library is used as soon as it is there.
                for written, place in ((figures, into.with_suffix(".json")), (made, into)):
                    with written.open("rb") as file:
                        os.fsync(file.fileno())
                    os.replace(written, place)  # whole or not at all: others may be looking
    except CompileError as error:
        raise KernelError(str(error)) from error
    except OSError as error:
        raise KernelError(
            f"the kernels can't be put into {into.parent}: {error}; name another folder in "
            f"$KVPOLICY_KERNELS"
        ) from error
    native.in_use.cache_clear()
    native.operators.cache_clear()
    return into


def _make(folder: Path) -> None:
    """Make a folder, and those on the way to it, for nobody else, whatever the umask."""
    for place in reversed((folder, *folder.parents)):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time, and nothing there of one that was killed.

    Where the system, or the disk, has no locks, builds go on side by side, and what is left of
    others stays.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # NFS may have none for folders
            pass
        else:
            for left in folder.glob("building-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _try(path: Path) -> dict[str, Any]:
    """What the trial of a library reports."""
    package = str(Path(here.__file__).parents[3])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "KVPOLICY_NATIVE": "0"}
    command = [sys.executable, "-m", "kvpolicy.ops.cpu.trial", str(path)]
    try:
        done = run_in(path.parent, command, timeout=_PATIENCE, env=environment)
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"the trial of {path.name} took more than {_PATIENCE} s") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise KernelError(f"what was compiled is of no use here, and is not kept: {said}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
