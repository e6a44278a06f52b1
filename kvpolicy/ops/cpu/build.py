"""Building the CPU kernels: compiled, tried in a process of its own, and only then put in place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import kvpolicy.ops.cpu as here
from kvpolicy.errors import KernelError
from kvpolicy.ops.cpu import native

__all__ = ["build"]

#: Seconds that a trial may take, on a machine as busy as may be.
_PATIENCE = 300


def build(compiler: str | None = None) -> Path:
    """Compile the kernels, unless that has been done and what is there is whole.

    They are loaded by a process of their own, which computes with each of them what torch computes
    without, and measures both: where a kernel is not the faster one on this machine, torch goes on
    doing it. What was chosen lies beside the library, in a file of JSON.

    Args:
        compiler: the C++ compiler; by default ``$CXX``, or the first of c++, g++ and clang++.

    Returns:
        The library. It is used by processes that start decoding from now on.

    Raises:
        KernelError: there is no compiler, or it fails, or what it made can't be loaded or computes
            something else, or the folder can't be written; nothing is left behind then.
    """
    into = native.library()
    if native.whole(into):
        return into
    found = shutil.which(compiler or os.environ.get("CXX") or "c++") or next(
        (path for name in ("g++", "clang++") if (path := shutil.which(name))), None
    )
    if found is None or (compiler is not None and shutil.which(compiler) is None):
        wanted = compiler or "c++, g++ or clang++"
        raise KernelError(f"no C++ compiler ({wanted}) is on the PATH; kvpolicy works without one")
    try:
        into.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into.parent, prefix="building-") as folder:
            made = Path(folder, into.name)
            _compile(found, Path(folder), made)
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
    except OSError as error:
        raise KernelError(
            f"the kernels can't be put into {into.parent}: {error}; name another folder in "
            f"$KVPOLICY_KERNELS"
        ) from error
    native.operators.cache_clear()
    native.figures.cache_clear()
    return into


def _compile(compiler: str, folder: Path, into: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    headers = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    libraries = torch_folder / "lib"
    # torch's own OpenMP, so that both share its threads; a second one's would fight for the cores.
    openmp: list[str | Path] = [*sorted(libraries.glob("lib*omp*.so*"))] or ["-fopenmp"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    unit = folder / "kernels.cpp"
    # One unit: most of the time goes into torch's headers, once for each.
    unit.write_text("".join(f'#include "{source}"\n' for source in native.SOURCES))
    command = [compiler, *native.flags(), "-fopenmp", abi, *(f"-I{path}" for path in headers)]
    command += ["-shared", str(unit), f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    command += [*map(str, openmp), "-o", str(into)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{compiler} failed ({done.returncode}):\n{done.stderr.strip()}")


def _try(path: Path) -> dict[str, Any]:
    """What the trial of a library reports."""
    package = str(Path(here.__file__).parents[3])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "KVPOLICY_NATIVE": "0"}
    command = [sys.executable, "-m", "kvpolicy.ops.cpu.trial", str(path)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"the trial of {path.name} took more than {_PATIENCE} s") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise KernelError(f"what was compiled is of no use here, and is not kept: {said}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
