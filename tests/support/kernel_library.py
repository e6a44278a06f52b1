"""Fixtures of tests of the CPU kernels: a library of their own, whatever this user has built."""

from __future__ import annotations

import shutil

import pytest
import torch
from filelock import FileLock

from kvpolicy.ops.cpu import native
from kvpolicy.ops.cpu.build import build

__all__ = ["COMPILER", "folder", "forget", "kernel", "needs_compiler", "operators", "uses"]

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
#: What the fixtures below replace.
uses = native.uses
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")


@pytest.fixture(scope="session")
def folder(request, tmp_path_factory):
    """A folder with the library in it, built once for all processes that run tests together.

    It outlives the run where pytest keeps a cache: a library is called after what it was made of.
    """
    cache = getattr(request.config, "cache", None)
    shared = tmp_path_factory.getbasetemp().parent / "kernels"
    built = shared if cache is None else cache.mkdir("kernels")
    built.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, FileLock(built / "lock"):
        patch.setenv("KVPOLICY_KERNELS", str(built))
        path = build()
    if cache is not None:  # this checkout's own
        for other in set(built.glob("*.so")) - {path}:
            other.unlink(missing_ok=True)
    assert path.parent == built
    return built


def forget():
    """Which library this process uses: the next to ask looks for it anew."""
    native.in_use.cache_clear()
    native.operators.cache_clear()


@pytest.fixture(scope="session")
def operators(folder):
    """The kernels by name, which nobody uses on that account."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPOLICY_KERNELS", str(folder))
        patch.setenv("KVPOLICY_NATIVE", "1")
        forget()
        found = native.operators()
    forget()
    with pytest.MonkeyPatch.context() as patch:
        # Which were faster while a busy machine built them is no matter of tests.
        patch.setattr(native, "uses", lambda name, dtype: True)
        yield found


@pytest.fixture
def kernel(folder, monkeypatch):
    """The kernel that writes and attends, which every new cache then uses."""
    monkeypatch.setenv("KVPOLICY_KERNELS", str(folder))
    monkeypatch.setenv("KVPOLICY_NATIVE", "1")
    monkeypatch.setattr(native, "uses", lambda name, dtype: True)
    forget()
    yield native.decoder(torch.float32)
    forget()
