"""The CPU kernels: built once on the machine that they are for, and used from then on.

``kvpolicy build-kernel`` (:mod:`kvpolicy.ops.cpu.build`) compiles the ``*_cpu.cpp`` of this folder
with the system's C++ compiler into one library in this user's cache folder, whose name carries the
sources, torch's version and what this processor can do. Whoever decodes then finds it there. A
wheel brings libraries of its own, one an instruction set, for the torch that it was built with.
Without either, torch's own operators do the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import stat
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KernelError
from kvpolicy.ops.cpu.compiling import HEADERS, SOURCES, flags

__all__ = [
    "DTYPES",
    "SHIPPED",
    "SLOWEST",
    "Kernel",
    "Library",
    "decoder",
    "digest",
    "in_use",
    "library",
    "linear",
    "march",
    "measure_of",
    "measured",
    "most_rows",
    "operators",
    "serves",
    "serving",
    "shipped",
    "stepper",
    "untrusted",
    "uses",
    "whole",
]

#: Of the keys and values that kernels read.
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

#: A kernel that takes longer than torch, but for noise, is not used.
SLOWEST = 0.97

#: Where a wheel has its libraries, and ``built.json``, which says what they were built for.
SHIPPED = Path(__file__).parent / "built"

#: An operator of torch.
Kernel = Callable[..., Any]
#: ``decode`` of ``decode_cpu.cpp``: see there.
Decoder = Callable[..., tuple[Tensor, Tensor, bool]]
#: ``linear`` of ``products_cpu.cpp``: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` or None.
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Library:
    """A library of kernels, and what it is used for.

    Attributes:
        path: where it lies.
        most_rows: up to which the kernel for skinny products is the faster one.
        times_as_fast: each kernel as torch without it, by :func:`measure_of`; where one has not
            been measured, nothing.
    """

    path: Path
    most_rows: int
    times_as_fast: Mapping[str, float] = field(default_factory=dict)


#: Rows that a library's kernel for skinny products serves where nobody has measured it.
_MOST_ROWS = {"x86-64-v4": 16, "x86-64-v3": 8}
#: What of a library that a wheel brings is left to torch: nobody has measured it where it runs, and
#: where these were, they took as long as torch or up to three times that.
_UNMEASURED = dict.fromkeys(("key_lengths", "key_lengths float16"), 0.0)
#: What a process has loaded, it keeps: torch knows an operator once.
_loaded: Path | None = None


def library() -> Path:
    """Where the library for this machine lies, or would lie.

    Raises:
        KernelError: nobody knows this user's home folder, and ``$KVPOLICY_KERNELS`` names no other.
    """
    what = hashlib.sha256()
    sources = [source.read_text() for source in (*SOURCES, *HEADERS)]
    for part in (*sources, *flags(march()), torch.__version__, platform.machine(), _features()):
        what.update(part.encode())
    try:
        folder = Path(os.environ.get("KVPOLICY_KERNELS") or "~/.cache/kvpolicy/kernels")
        folder = folder.expanduser()
    except RuntimeError as error:
        raise KernelError("there is no home folder; name one in $KVPOLICY_KERNELS") from error
    return folder / f"cpu-{what.hexdigest()[:16]}.so"


def march() -> str:
    """This processor, or the one that ``$KVPOLICY_MARCH`` names, as compilers name them."""
    return os.environ.get("KVPOLICY_MARCH") or "native"


def untrusted(path: Path) -> str | None:
    """Why code from this file, or folder, must not be loaded, in words; None if it may.

    Whoever can write the file, or a folder on the way to it, can run code as the user who loads it.
    As ssh does with its files, folders are looked at up to the home folder, or the root.
    """
    if os.name != "posix":
        return None
    path = path.resolve()
    own = {path, path if path.is_dir() else path.parent}
    for place in (path, *path.parents):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user"
        # In a folder like /tmp everybody may write, and nobody move what belongs to others.
        shared = status.st_mode & stat.S_ISVTX and place not in own
        if status.st_mode & 0o022 and not shared:
            return f"others may write {place}"
        if place == _home():
            break
    return None


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measured(path: Path) -> dict[str, Any]:
    """What was measured when a library was built; empty where that is not known."""
    beside = path.with_suffix(".json")
    try:
        if untrusted(beside) is not None:
            return {}
        found = json.loads(beside.read_text(encoding="utf-8"))
        return {
            "times_as_fast": dict(found["times_as_fast"]),
            "most_rows": int(found["most_rows"]),
            "sha256": str(found["sha256"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def whole(path: Path) -> bool:
    """Whether there is a library, bit for bit the one that was built, which may be loaded."""
    return (
        path.exists() and untrusted(path) is None and measured(path).get("sha256") == digest(path)
    )


def shipped() -> Path | None:
    """The library for this processor that the installation brought, if it did.

    Raises:
        KernelError: it was built for another torch, or it is damaged.
    """
    try:
        said = json.loads((SHIPPED / "built.json").read_text(encoding="utf-8"))
        built_for, digests = str(said["torch"]), dict(said["sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KernelError(f"the CPU kernels in {SHIPPED} are not used: {error!r}") from error
    if built_for != _public(torch.__version__):
        raise KernelError(
            f"the CPU kernels that came with kvpolicy are for torch {built_for}, and are not used "
            f"with {torch.__version__}"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    wide = ["x86-64-v4"] if capability.startswith(("AVX512", "AVX10")) else []
    for name in wide + (["x86-64-v3"] if wide or capability == "AVX2" else []):
        if name in digests:
            path = SHIPPED / f"{name}.so"
            # Of a file that was cut short, loading would end the whole process.
            if not path.exists() or digest(path) != digests[name]:
                raise KernelError(f"the CPU kernels in {path} are not used: it is damaged")
            return path
    return None


def _public(version: str) -> str:
    """A version without what says which devices it was built for."""
    return version.partition("+")[0]


@functools.cache
def in_use() -> Library | None:
    """The library that this process uses: built here, or brought by the installation.

    None where there is neither, or if ``$KVPOLICY_NATIVE`` is 0. A library that can't be loaded, or
    that others could have written, is left alone, with a warning: whatever it would do faster is
    done by torch.
    """
    if os.environ.get("KVPOLICY_NATIVE", "1") == "0":
        return None
    for find in (_find_built, _find_shipped):
        try:
            found = find()
            if found is not None and _load(found.path):
                return found
        except (KernelError, OSError) as error:
            warnings.warn(
                f"{error}; `kvpolicy build-kernel` makes them anew, and KVPOLICY_NATIVE=0 does "
                f"without",
                RuntimeWarning,
                stacklevel=3,
            )
    return None


def _find_built() -> Library | None:
    try:
        path = library()
        if not path.exists():
            return None
    except (KernelError, PermissionError):
        return None  # no folder that this user could read: nothing was built
    report = measured(path)
    refused = untrusted(path)
    # Of a file that was cut short, or written over, loading would end the whole process.
    if refused is None and report.get("sha256") != digest(path):
        refused = "they are not what was built"
    if refused is not None:
        raise KernelError(f"the CPU kernels in {path} are not used: {refused}")
    return Library(path.resolve(), report["most_rows"], report["times_as_fast"])


def _find_shipped() -> Library | None:
    path = shipped()
    return None if path is None else Library(path, _MOST_ROWS[path.stem], _UNMEASURED)


def _load(path: Path) -> bool:
    """Load a library, unless this process has another one already; whether it has this one."""
    global _loaded
    if _loaded is None:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        _loaded = path
    return _loaded == path


@functools.cache
def operators() -> Any:
    """The kernels, operators of torch by name; None without a library."""
    return None if in_use() is None else torch.ops.kvpolicy_cpu


def measure_of(name: str, dtype: torch.dtype) -> str:
    """What the measure of a kernel on tensors of a dtype is called: in float32, as the kernel."""
    half = dtype in (torch.bfloat16, torch.float16)
    return f"{name} {str(dtype).removeprefix('torch.')}" if half else name


def uses(name: str, dtype: torch.dtype) -> bool:
    """Whether a kernel was the faster one when the library was built, or nobody knows."""
    found = in_use()
    return found is None or found.times_as_fast.get(measure_of(name, dtype), 1.0) >= SLOWEST


def decoder(dtype: torch.dtype) -> Decoder | None:
    """The kernel that writes a token and attends to it in one pass; None where torch does it.

    Args:
        dtype: of the keys and values.
    """
    found = operators()
    return None if found is None or not uses("decode", dtype) else found.decode.default


def stepper(dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The same for compiled code, whose position is a tensor."""
    found = operators()
    return None if found is None or not uses("decode", dtype) else found.decode_step.default


def most_rows() -> int:
    """Rows up to which the kernel for skinny products is the faster one on this machine."""
    found = in_use()
    return 16 if found is None else found.most_rows


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
    if found is None or torch.compiler.is_compiling() or not uses(name, tensor.dtype):
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
