"""The CPU kernels: built once on the machine that they are for, and used from then on.

``kvpolicy build-kernel`` (:mod:`kvpolicy.ops.cpu.build`) compiles the ``*_cpu.cpp`` of this folder
with the system's C++ compiler into one library in this user's cache folder, whose name carries the
sources, torch's version and what this processor can do. Whoever decodes then finds it there;
without it, torch's own operators do the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KernelError

__all__ = [
    "DTYPES",
    "SLOWEST",
    "SOURCES",
    "Kernel",
    "decoder",
    "digest",
    "figures",
    "flags",
    "library",
    "linear",
    "most_rows",
    "operators",
    "serves",
    "serving",
    "stepper",
    "trusted",
    "uses",
    "whole",
]

SOURCES = tuple(sorted(Path(__file__).parent.glob("*_cpu.cpp")))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
#: No contraction: which products and sums are fused is written in the sources (see lanes.h).
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",
)
#: Of the keys and values that kernels read.
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

#: A kernel that takes longer than torch, but for noise, is not used.
SLOWEST = 0.97

#: An operator of torch.
Kernel = Callable[..., Any]
#: ``decode`` of ``decode_cpu.cpp``: see there.
Decoder = Callable[..., tuple[Tensor, Tensor, bool]]
#: ``linear`` of ``products_cpu.cpp``: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` or None.
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def library() -> Path:
    """Where the library for this machine lies, or would lie.

    Raises:
        KernelError: nobody knows this user's home folder, and ``$KVPOLICY_KERNELS`` names no other.
    """
    what = hashlib.sha256()
    sources = [source.read_text() for source in (*SOURCES, *_HEADERS)]
    for part in (*sources, *flags(), torch.__version__, platform.machine(), _features()):
        what.update(part.encode())
    try:
        folder = Path(os.environ.get("KVPOLICY_KERNELS") or "~/.cache/kvpolicy/kernels")
        folder = folder.expanduser()
    except RuntimeError as error:
        raise KernelError("there is no home folder; name one in $KVPOLICY_KERNELS") from error
    return folder / f"cpu-{what.hexdigest()[:16]}.so"


def flags() -> tuple[str, ...]:
    """For this processor, or the one that ``$KVPOLICY_MARCH`` names, as compilers name them."""
    return (*_FLAGS, f"-march={os.environ.get('KVPOLICY_MARCH') or 'native'}")


def trusted(path: Path) -> str | None:
    """Why code from this file must not be loaded, in words; None if it may.

    Whoever can write the file, or its folder, can run code as the user who loads it.
    """
    if os.name != "posix":
        return None
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user"
        if status.st_mode & 0o022:
            return f"others may write {place}"
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def figures() -> dict[str, Any]:
    """What was measured when the library was built; empty where that is not known."""
    try:
        path = library().with_suffix(".json")
        if trusted(path) is not None:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "times_as_fast": dict(found["times_as_fast"]),
            "most_rows": int(found["most_rows"]),
            "sha256": str(found["sha256"]),
        }
    except (OSError, ValueError, KeyError, TypeError, KernelError):
        return {}


@functools.cache
def operators() -> Any:
    """The kernels, operators of torch by name; None unless built, or if ``$KVPOLICY_NATIVE`` is 0.

    A library that can't be loaded, or that others could have written, is left alone, with a
    warning: whatever it would do faster is done by torch.
    """
    if os.environ.get("KVPOLICY_NATIVE", "1") == "0":
        return None
    try:
        path = library()
        if not path.exists():
            return None
        refused = trusted(path)
        # Of a file that was cut short, or written over, loading would end the whole process.
        if refused is None and figures().get("sha256") != digest(path):
            refused = "they are not what was built"
        if refused is None:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
            return torch.ops.kvpolicy_cpu
    except KernelError:
        return None  # no folder: nothing was built
    except OSError as error:
        refused = str(error)
    warnings.warn(
        f"the CPU kernels in {path} are not used: {refused}; `kvpolicy build-kernel` makes them "
        f"anew, and KVPOLICY_NATIVE=0 does without",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def whole(path: Path) -> bool:
    """Whether there is a library, bit for bit the one that was built, which may be loaded."""
    figures.cache_clear()
    return path.exists() and trusted(path) is None and figures().get("sha256") == digest(path)


def uses(name: str) -> bool:
    """Whether a kernel was the faster one when the library was built, or nobody knows."""
    ratio: float = figures().get("times_as_fast", {}).get(name, 1.0)
    return ratio >= SLOWEST


def decoder() -> Decoder | None:
    """The kernel that writes a token and attends to it in one pass; None where it is not built."""
    found = operators()
    return None if found is None or not uses("decode") else found.decode.default


def stepper() -> Callable[..., Tensor] | None:
    """The same for compiled code, whose position is a tensor; None where it is not built."""
    found = operators()
    return None if found is None or not uses("decode") else found.decode_step.default


def most_rows() -> int:
    """Rows up to which the kernel for skinny products is the faster one on this machine."""
    rows: int = figures().get("most_rows", 16)
    return rows


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
    if found is None or torch.compiler.is_compiling() or not uses(name):
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
