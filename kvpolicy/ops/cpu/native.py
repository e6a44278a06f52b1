"""The CPU kernels: built once on the machine that they are for, and used from then on.

``kvpolicy build-kernel`` (or :func:`build`) compiles the ``*_cpu.cpp`` of this folder with the
system's C++ compiler into one library in this user's cache folder, whose name carries the sources,
torch's version and what this processor can do. Whoever decodes then finds it there; without it,
torch's own operators do the same.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KernelError

__all__ = [
    "DTYPES",
    "MOST_ROWS",
    "Kernel",
    "build",
    "decoder",
    "library",
    "linear",
    "operators",
    "serves",
    "serving",
    "stepper",
]

_SOURCES = tuple(sorted(Path(__file__).parent.glob("*_cpu.cpp")))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
#: No contraction: which products and sums are fused is written in the sources (see lanes.h).
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",
)
#: Of the keys and values that kernels read.
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

#: An operator of torch.
Kernel = Callable[..., Any]
#: ``decode`` of ``decode_cpu.cpp``: see there.
Decoder = Callable[..., tuple[Tensor, Tensor, bool]]
#: ``linear`` of ``products_cpu.cpp``: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` or None.
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def library() -> Path:
    """Where the library for this machine lies, or would lie."""
    what = hashlib.sha256()
    sources = [source.read_text() for source in (*_SOURCES, *_HEADERS)]
    for part in (*sources, *_flags(), torch.__version__, platform.machine(), _features()):
        what.update(part.encode())
    folder = Path(os.environ.get("KVPOLICY_KERNELS", "~/.cache/kvpolicy/kernels")).expanduser()
    return folder / f"cpu-{what.hexdigest()[:16]}.so"


def _flags() -> tuple[str, ...]:
    """For this processor, or the one that ``$KVPOLICY_MARCH`` names, as compilers name them."""
    return (*_FLAGS, f"-march={os.environ.get('KVPOLICY_MARCH') or 'native'}")


def build(compiler: str | None = None) -> Path:
    """Compile the kernels, unless that has been done.

    Args:
        compiler: the C++ compiler; by default ``$CXX``, or the first of c++, g++ and clang++.

    Returns:
        The library. It is used by processes that start decoding from now on.

    Raises:
        KernelError: there is no compiler, or it fails; the message has what it printed.
    """
    into = library()
    if into.exists():
        return into
    found = shutil.which(compiler or os.environ.get("CXX") or "c++") or next(
        (path for name in ("g++", "clang++") if (path := shutil.which(name))), None
    )
    if found is None or (compiler is not None and shutil.which(compiler) is None):
        wanted = compiler or "c++, g++ or clang++"
        raise KernelError(f"no C++ compiler ({wanted}) is on the PATH; kvpolicy works without one")
    torch_folder = Path(torch.__file__).parent
    headers = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    libraries = torch_folder / "lib"
    # torch's own OpenMP, so that both share its threads; a second one's would fight for the cores.
    openmp: list[str | Path] = [*sorted(libraries.glob("lib*omp*.so*"))] or ["-fopenmp"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        linked, unit = Path(folder, "linked.so"), Path(folder, "kernels.cpp")
        # One unit: most of the time goes into torch's headers, once for each.
        unit.write_text("".join(f'#include "{source}"\n' for source in _SOURCES))
        include = [f"-I{path}" for path in headers]
        link: list[str | Path] = [f"-L{libraries}", "-ltorch_cpu", "-lc10", *openmp]
        _call(found, *_flags(), "-fopenmp", abi, *include, "-shared", unit, *link, "-o", linked)
        os.replace(linked, into)  # whole or not at all: another process may be looking
    operators.cache_clear()
    return into


@functools.cache
def operators() -> Any:
    """The kernels, operators of torch by name; None unless built, or if ``$KVPOLICY_NATIVE`` is 0.

    Raises:
        KernelError: the library is there and can't be loaded.
    """
    if os.environ.get("KVPOLICY_NATIVE", "1") == "0":
        return None
    path = library()
    if not path.exists():
        return None
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelError(f"{path} can't be loaded: {error}; delete it and build again") from error
    return torch.ops.kvpolicy_cpu


def decoder() -> Decoder | None:
    """The kernel that writes a token and attends to it in one pass; None where it is not built."""
    found = operators()
    return None if found is None else found.decode.default


def stepper() -> Callable[..., Tensor] | None:
    """The same for compiled code, whose position is a tensor; None where it is not built."""
    found = operators()
    return None if found is None else found.decode_step.default


#: Rows up to which the kernel for skinny products is the faster one. Measured with the weights of
#: LlamaGen-B (torch 2.13, 2 cores, float32): torch takes 1.0 times as long for 1 row, 1.6 to 1.7
#: for 4, 1.8 to 2.0 for 8, 1.3 to 1.5 for 16, 1.2 for 32 and 0.9 to 1.0 for 64.
MOST_ROWS = 32


def linear() -> Linear | None:
    """``x [..., K] @ weight [N, K].T + bias [N]`` for a few rows; None where it is not built."""
    found = operators()
    return None if found is None else found.linear.default


def serving(name: str, tensor: Tensor) -> Kernel | None:
    """The kernel of this name, if it is built and serves a tensor like this one, and its company.

    All tensors of an operation lie on one device; which dtypes they have is for the caller to know.
    """
    if not tensor.is_cpu or type(tensor) is not Tensor or tensor.requires_grad:
        return None
    found = operators()
    if found is None or torch.compiler.is_compiling():
        return None
    kernel: Kernel = getattr(found, name).default
    return kernel


def serves(*tensors: Tensor) -> bool:
    """Whether keys and values like these can be left to the kernel."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return False
    for tensor in tensors:  # a loop: this is asked at every token, where all() takes twice as long
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype is not dtype:
            return False
        if tensor.stride(3) != 1 or tensor.requires_grad:
            return False
    return True


def _features() -> str:
    """What the processor can do: code for one may not run on another that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _call(compiler: str, *arguments: str | Path) -> None:
    done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{compiler} failed ({done.returncode}):\n{done.stderr.strip()}")
