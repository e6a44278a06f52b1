"""Fixtures of tests of the CPU kernels: a library of their own, whatever this user has built."""

from __future__ import annotations

import os
import shutil

import pytest

from kvpolicy.ops.cpu import native

__all__ = ["COMPILER", "folder", "kernel", "needs_compiler", "operators"]

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with the library in it, built once for all processes that run tests together."""
    built = tmp_path_factory.getbasetemp().parent / "kernels"
    before = os.environ.get("KVPOLICY_KERNELS")
    os.environ["KVPOLICY_KERNELS"] = str(built)
    try:
        path = native.build()
    finally:
        os.environ.pop("KVPOLICY_KERNELS")
        if before is not None:
            os.environ["KVPOLICY_KERNELS"] = before
    assert path.parent == built
    return built


@pytest.fixture(scope="session")
def operators(folder):
    """The kernels by name, which nobody uses on that account."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPOLICY_KERNELS", str(folder))
        patch.setenv("KVPOLICY_NATIVE", "1")
        native.operators.cache_clear()
        found = native.operators()
    native.operators.cache_clear()
    return found


@pytest.fixture
def kernel(folder, monkeypatch):
    """The kernel that writes and attends, which every new cache then uses."""
    monkeypatch.setenv("KVPOLICY_KERNELS", str(folder))
    monkeypatch.setenv("KVPOLICY_NATIVE", "1")
    native.operators.cache_clear()
    yield native.decoder()
    native.operators.cache_clear()
